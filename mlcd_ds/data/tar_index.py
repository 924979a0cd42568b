"""Side-car indexes of tars, `00012_index.npz` beside `00012.tar`: where everything is, without walking the headers.

An index holds the tar's size and time of last change; one that does not fit them, or is damaged (the archive's own CRC-32
of each part), is not used. A tar changed in place with its size and time kept is believed to be as it was.

Shapes: n image samples of a tar, m members of them.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlcd_ds.collectives import gather_objects
from mlcd_ds.config import IndexShardsConfig
from mlcd_ds.data.tars import TarIndex, TarState, examine_tar, expand_shards, local_shard
from mlcd_ds.errors import DataError
from mlcd_ds.files import write_bytes
from mlcd_ds.topology import Topology

FORMAT_VERSION = 1
_PARTS = ("about", "keys", "extensions", "without_image", "sample", "extension", "offset", "size")


@dataclass(frozen=True)
class FoundIndex:
    """An index, and where it comes from: "file", "absent" (walked, no file), "stale" or "damaged" (walked, file ignored).

    kept: whether a file holds it now. damage: of the tar; then `index` is of what comes before it, and keys_before are the
    keys of an earlier, whole state of the tar, where an index tells.
    """

    index: TarIndex
    source: str
    kept: bool = False
    damage: DataError | None = None
    keys_before: tuple[str, ...] = ()


def index_path(tar: str | Path) -> Path:
    """Where the index of a local tar lies."""
    tar = Path(tar)
    return tar.with_name(tar.name.removesuffix(".tar") + "_index.npz")


def write_index(index: TarIndex, path: Path | None = None) -> Path:
    """Writes the index beside its tar, or to `path`, under a temporary name first; the same tar gives the same bytes.

    It is of the file that was walked, whatever lies there by now.
    Raises DataError when it cannot be written there.
    """
    path = path or index_path(index.path)
    rows = [
        (sample, extension, *place)
        for sample, key in enumerate(index.keys)
        for extension, place in index.members[key].items()
    ]
    extensions = sorted({extension for _, extension, _, _ in rows})
    number = {extension: i for i, extension in enumerate(extensions)}
    about = {
        "format_version": FORMAT_VERSION,
        "tar_bytes": index.state.size,
        "tar_mtime_ns": index.state.mtime_ns,
        "duplicates": index.duplicates,
        "ignored": index.ignored,
    }
    parts = {
        "about": _text([json.dumps(about, sort_keys=True)]),
        "keys": _text(index.keys),
        "extensions": _text(extensions),
        "without_image": _text(index.without_image),
        "sample": np.array([row[0] for row in rows], np.int32),
        "extension": np.array([number[row[1]] for row in rows], np.int32),
        "offset": np.array([row[2] for row in rows], np.int64),
        "size": np.array([row[3] for row in rows], np.int64),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, lambda file: np.savez(file, **parts))
    except OSError as error:
        raise DataError(
            f"cannot write the index {path}: {error}. Runs work without it, but walk the tar at every start."
        ) from None
    return path


def find_index(path: str | Path) -> FoundIndex:
    """The index of a local tar: from its file where that fits, else by walking the headers (see `index_tar`)."""
    found = examine(path)
    if found.damage is not None:
        raise found.damage
    return found


def examine(path: str | Path, folder: Path | None = None) -> FoundIndex:
    """As `find_index`, but raises nothing for a tar that is damaged or missing: `damage` tells.

    folder: where an index may lie, too, as NAME_index.npz. With it, the index of a tar that had to be walked is kept: beside
    the tar, or there where that cannot be written to.
    """
    path = Path(path)
    places = [index_path(path)] + ([] if folder is None else [folder / index_path(path).name])
    source, keys_before = "absent", ()
    for place in places:
        if not place.is_file():
            continue
        try:
            index, fits = _read(path, place)
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, EOFError, NotImplementedError):
            source = "damaged"
            continue
        if fits:
            return FoundIndex(index, "file", kept=True)
        source, keys_before = "stale", index.keys
    index, damage = examine_tar(path)
    if damage is not None:
        return FoundIndex(index, source, damage=damage, keys_before=keys_before)
    return FoundIndex(index, source, kept=folder is not None and any(_written(index, place) for place in places))


def _written(index: TarIndex, place: Path) -> bool:
    try:
        write_index(index, place)
    except DataError:
        return False
    return True


def _read(path: Path, place: Path) -> tuple[TarIndex, bool]:
    """An index, and whether the tar is as it was then. Raises one of several exceptions for a damaged file."""
    with np.load(place, allow_pickle=False) as file:
        parts = {name: file[name] for name in _PARTS}
    about = json.loads(_lines(parts["about"])[0])
    if about["format_version"] != FORMAT_VERSION:
        return TarIndex(path, (), {}), False
    state = TarState(about["tar_bytes"], about["tar_mtime_ns"])
    fits = path.is_file() and TarState.of(path.stat()) == state
    keys, extensions = _lines(parts["keys"]), _lines(parts["extensions"])
    members: dict[str, dict[str, tuple[int, int]]] = {key: {} for key in keys}
    columns = (parts[name].tolist() for name in ("sample", "extension", "offset", "size"))
    for sample, extension, offset, size in zip(*columns, strict=True):
        if not 0 <= offset <= offset + size <= state.size:
            raise ValueError("a member outside the tar")
        members[keys[sample]][extensions[extension]] = (offset, size)
    without = tuple(_lines(parts["without_image"]))
    counts = int(about["duplicates"]), int(about["ignored"])
    return TarIndex(path, tuple(keys), members, *counts, without, state), fits


def _text(items: Sequence[str]) -> np.ndarray:
    """Texts, which hold no NUL, as one array of bytes."""
    return np.frombuffer("".join(f"{item}\0" for item in items).encode("utf-8", "surrogateescape"), np.uint8)


def _lines(part: np.ndarray) -> list[str]:
    return part.astype(np.uint8).tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


def _unused(index: TarIndex) -> dict[str, int]:
    """What of a tar a run does not use, by words for people."""
    return {
        "members repeat a name of their tar (the first one counts)": index.duplicates,
        "members are not part of a sample (no extension, or not a file)": index.ignored,
        "samples have no image": len(index.without_image),
    }


def index_shards(config: IndexShardsConfig) -> dict[str, int]:
    """Writes the index of every tar that lacks a good one, each rank its share; counts by what was there before.

    Start it alone or under the launcher. Prints a line per damaged tar, a line for what of a tar a run would not use, and a
    summary.
    Raises DataError, after all others are done, when tars are damaged or indexes cannot be written.
    """
    from tqdm import tqdm

    topology = Topology.from_environment()
    topology.start(config.timeout_minutes)
    shards = expand_shards(config.shards, config.allow_pipe)
    own = shards[topology.rank :: topology.world_size]
    counts: Counter = Counter()
    unused: Counter = Counter()
    problems = []
    for shard in tqdm(own, desc="index", unit="tar", disable=not topology.is_main, mininterval=1):
        try:
            found = find_index(local_shard(shard, config.shard_cache, config.allow_pipe))
            if found.source != "file":
                write_index(found.index)
            counts[found.source] += 1
            counts["images"] += len(found.index.keys)
            for name, number in _unused(found.index).items():
                if number:
                    unused[name] += number
                    print(f"{shard}: {number:,} {name}", flush=True)
        except DataError as error:
            problems.append(str(error))
    gathered = gather_objects((counts, unused, problems), topology)
    total = sum((count for count, _, _ in gathered), Counter())
    unused = sum((count for _, count, _ in gathered), Counter())
    problems = [problem for _, _, some in gathered for problem in some]
    topology.stop()
    if topology.is_main:
        written = sum(total[source] for source in ("absent", "stale", "damaged"))
        print(
            f"{written} indexes written ({total['stale']} were stale, {total['damaged']} damaged), {total['file']} kept, "
            f"{total['images']:,} images" + "".join(f"; {number:,} {name}" for name, number in unused.items())
        )
    if problems:
        raise DataError(f"{len(problems)} of {len(shards)} tars have no index:\n" + "\n".join(problems[:20]))
    return dict(total + unused)
