"""Tars joined with their labels, or with the captions in them: what every rank must know before the first step, and what
reads one sample.

Shapes: n images of a shard, H folders of labels (one per head), l labels used per image and folder.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.collectives import gather_objects
from mlcd_ds.data.captions import EXTENSIONS, CaptionError, caption_extension, read_caption
from mlcd_ds.data.labels import (
    LabelShard,
    LabelsInfo,
    check_enough_labels,
    check_same_labels,
    label_path,
    missing_labels,
    read_label_shard,
)
from mlcd_ds.data.tar_index import find_index
from mlcd_ds.data.tars import TarIndex, local_shard, shard_name
from mlcd_ds.errors import DataError
from mlcd_ds.topology import Topology

KEPT_SAMPLES = 2_000_000
"""Samples whose places and labels stay in memory after the check at the start (about 60 bytes each)."""

MAX_OPEN_FILES = 64
"""Tars that one process keeps open: far below the usual limit of 1024 files."""


@dataclass(frozen=True)
class ShardContents:
    """A tar's images in tar order, joined with their labels by key; compact, for millions live in memory.

    keys: bytes [n]. offsets, sizes: int64 [n], of the image in the tar. labels: int32 [n, H*l], folder h's in the columns
    from h*l on, nearest first, NO_LABEL as padding. labelled: bool [n], whether the image is in every folder, or, of a run
    on captions, has a member to hold one. captions: int64 [n, 3], of a run on captions: byte offset and size of that member,
    and which of captions.EXTENSIONS it is (-1: none).
    """

    path: Path
    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    labelled: np.ndarray
    captions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        """Key of one image."""
        return self.keys[index].decode()


@dataclass(frozen=True)
class ShardTable:
    """All shards of a run, the same on every rank.

    shards: paths or URLs, and names: what their labels are found by. counts: images of each. labels_dirs: the H folders of
    labels, and labels_infos: what the labels of each are of. without_label: images without a label in some folder (they
    are skipped, and counted, in every epoch). duplicates, ignored, without_image: members and samples of the tars that
    are not used (see `TarIndex`). unfit_indexes: side-car indexes that are stale or damaged (their tars were
    walked). surplus_labels: rows of label files whose image is not in the tar (one that lost whole members looks like that).
    captions: images are paired with their captions, not with labels; without_label then counts those without one.
    """

    shards: tuple[str, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...]
    labels_dirs: tuple[Path, ...]
    num_positives: int
    cache_dir: str | None
    labels_infos: tuple[LabelsInfo, ...]
    without_label: int = 0
    duplicates: int = 0
    ignored: int = 0
    without_image: int = 0
    unfit_indexes: int = 0
    surplus_labels: int = 0
    captions: bool = False
    kept: dict[int, ShardContents] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        """Images of one epoch."""
        return sum(self.counts)

    def unused(self) -> tuple[str, ...]:
        """Sentences for people: what of the tars takes no part in the run, and how many of it; empty where all does."""
        what = "caption" if self.captions else "label"
        sentences = (
            (self.without_label, f"images have no {what}: they are skipped, and counted, in every epoch"),
            (self.duplicates, "members repeat a name of their tar: the first one counts"),
            (self.without_image, "samples have no image"),
            (self.ignored, "members are not part of a sample (no extension, or not a file)"),
            (self.surplus_labels, "labels are of images that the tars lack: did tars lose images after labelling?"),
            (
                self.unfit_indexes,
                "indexes are stale or damaged, their tars were walked: run tools/index_shards.py again",
            ),
        )
        return tuple(f"{count:,} {text}" for count, text in sentences if count)

    def fingerprint(self) -> str:
        """Changes with names, counts or labels: for a checkpoint to compare."""
        infos = self.labels_infos if len(self.labels_infos) > 1 else next(iter(self.labels_infos), "captions")
        text = repr((self.names, self.counts, infos, self.num_positives))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, shard: int) -> ShardContents:
        """Reads a tar's index or headers and its labels again; raises DataError when either changed since the start."""
        if shard in self.kept:
            return self.kept[shard]
        path = local_shard(self.shards[shard], self.cache_dir)
        labels = [read_label_shard(label_path(folder, self.names[shard])) for folder in self.labels_dirs]
        contents = _join(find_index(path).index, labels, self.num_positives, self.captions)
        infos = tuple(found.info for found in labels)
        if len(contents) != self.counts[shard] or infos != self.labels_infos:
            raise DataError(
                f"{path} or its labels changed while the run was reading them: {self.counts[shard]} images of "
                f"{_listed(self.labels_infos)} at the start, now {len(contents)} of {_listed(infos)}. Start again with "
                "--resume auto."
            )
        return contents


def _join(
    index: TarIndex, labels: Sequence[LabelShard], num_positives: int, with_captions: bool = False
) -> ShardContents:
    """labels: of the same tar, from each of the folders."""
    joined = np.full((len(index.keys), len(labels), num_positives), NO_LABEL, np.int32)
    labelled = np.ones(len(index.keys), bool)
    for folder, found in enumerate(labels):
        wanted = _rows(index, found)
        joined[wanted >= 0, folder] = found.labels[wanted[wanted >= 0], :num_positives]
        labelled &= wanted >= 0
    places = np.array([index.image(key) for key in index.keys], np.int64).reshape(-1, 2)
    keys = np.array([key.encode() for key in index.keys])
    captions = None
    if with_captions:
        captions = np.array([_caption_place(index.members[key]) for key in index.keys], np.int64).reshape(-1, 3)
        labelled = captions[:, 2] >= 0
    columns = places[:, 0], places[:, 1], joined.reshape(len(keys), -1 if len(labels) else 0)
    return ShardContents(index.path, keys, *columns, labelled, captions)


def _caption_place(members: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    extension = caption_extension(members)
    return (0, 0, -1) if extension is None else (*members[extension], EXTENSIONS.index(extension))


def _rows(index: TarIndex, labels: LabelShard) -> np.ndarray:
    """int64 [n]: the row of each image of the tar in its label file, -1 where it has none."""
    rows = {key: row for row, key in enumerate(labels.keys)}
    return np.array([rows.get(key, -1) for key in index.keys], np.int64)


def _listed(items: Sequence) -> str:
    return " and ".join(map(str, items))


@dataclass
class _Found:
    """What one rank learnt about one shard, to be exchanged."""

    shard: int
    count: int = 0
    infos: tuple[LabelsInfo, ...] = ()
    unlabelled: tuple[str, ...] = ()
    num_unlabelled: int = 0
    lacking_in: tuple[int, ...] = ()  # images without a label, by folder
    duplicates: int = 0
    ignored: int = 0
    without_image: int = 0
    index_source: str = "absent"
    surplus_labels: int = 0
    missing_labels: Path | None = None  # the folder
    error: str | None = None


def build_shard_table(
    shards: Sequence[str],
    labels_dirs: Sequence[str | Path],
    num_positives: int,
    max_skipped_fraction: float,
    cache_dir: str | None,
    topology: Topology,
    captions: bool = False,
) -> ShardTable:
    """Walks all tars (or reads their indexes, see tar_index.py), each rank its share, checks them against their labels, and
    tells every rank the result.

    labels_dirs: folders of labels, one per head; an image must be in all of them. captions: there are none, the images'
    captions in the tars take their place. num_positives: labels an image and
    folder to use. cache_dir: where remote tars are fetched to.
    Raises DataError, the same on every rank, when a tar is damaged or holds no image, label files are missing, of
    different centers within a folder or with fewer labels than num_positives, a label is not below k, or more than
    `max_skipped_fraction` of the images lack a label.
    One all-gather of a few bytes per shard.
    """
    if not shards:
        raise DataError("no shards: name the image tars with --shards")
    labels_dirs = tuple(Path(folder) for folder in labels_dirs)
    kept: dict[int, ShardContents] = {}
    own = []
    for shard in range(topology.rank, len(shards), topology.world_size):
        own.append(_examine(shard, shards[shard], labels_dirs, num_positives, cache_dir, kept, captions))
    found = [entry for part in gather_objects(own, topology) for entry in part]
    found.sort(key=lambda entry: entry.shard)
    names = tuple(shard_name(shard) for shard in shards)
    _raise_problems(found, names)
    for head, folder in enumerate(labels_dirs):
        check_same_labels([(label_path(folder, names[entry.shard]), entry.infos[head]) for entry in found])
        check_enough_labels(folder, found[0].infos[head], num_positives)
    _check_unlabelled(found, shards, labels_dirs, max_skipped_fraction)
    return ShardTable(
        shards=tuple(shards),
        names=names,
        counts=tuple(entry.count for entry in found),
        labels_dirs=labels_dirs,
        num_positives=num_positives,
        cache_dir=cache_dir,
        labels_infos=found[0].infos,
        without_label=sum(entry.num_unlabelled for entry in found),
        duplicates=sum(entry.duplicates for entry in found),
        ignored=sum(entry.ignored for entry in found),
        without_image=sum(entry.without_image for entry in found),
        surplus_labels=sum(entry.surplus_labels for entry in found),
        captions=captions,
        unfit_indexes=sum(entry.index_source in ("stale", "damaged") for entry in found),
        kept=kept,
    )


def _examine(
    shard: int,
    path: str,
    labels_dirs: Sequence[Path],
    num_positives: int,
    cache_dir: str | None,
    kept: dict[int, ShardContents],
    captions: bool,
) -> _Found:
    """Never raises: what went wrong has to reach the other ranks, which wait in the collective that follows."""
    found = _Found(shard)
    try:
        whereabouts = find_index(local_shard(path, cache_dir))
        index, found.index_source = whereabouts.index, whereabouts.source
        if not index.keys:
            names = [f"{key}.*" for key in index.without_image[:3]] or ["nothing"]
            raise DataError(
                f"the tar {path} holds no image: found {', '.join(names)}, wanted KEY.jpg, KEY.jpeg, KEY.png or KEY.webp "
                "(the key ends at the first dot). Take it out of the shard list."
            )
        found.count, found.duplicates, found.ignored = len(index.keys), index.duplicates, index.ignored
        found.without_image = len(index.without_image)
        files = [label_path(folder, shard_name(path)) for folder in labels_dirs]
        found.missing_labels = next((file.parent for file in files if not file.is_file()), None)
        if found.missing_labels is not None:
            return found
        labels = [read_label_shard(file) for file in files]
        found.infos = tuple(shard_labels.info for shard_labels in labels)
        if min((info.num_positives for info in found.infos), default=num_positives) < num_positives:
            return found
        contents = _join(index, labels, num_positives, captions)
        found.lacking_in = tuple(int((_rows(index, shard_labels) < 0).sum()) for shard_labels in labels)
        found.surplus_labels = sum(
            len(shard_labels.keys) - len(index.keys) + lacking
            for shard_labels, lacking in zip(labels, found.lacking_in, strict=True)
        )
        lacking = np.nonzero(~contents.labelled)[0]
        found.num_unlabelled = len(lacking)
        found.unlabelled = tuple(contents.key(row) for row in lacking[:3])
        if sum(map(len, kept.values())) + len(contents) <= KEPT_SAMPLES:
            kept[shard] = contents
    except DataError as error:
        found.error = str(error)
    except Exception as error:
        found.error = f"reading {path} and its labels failed: {type(error).__name__}: {error}"
    return found


def _raise_problems(found: list[_Found], names: Sequence[str]) -> None:
    errors = [entry.error for entry in found if entry.error]
    if errors:
        more = f" ({len(errors) - 1} more of the {len(found)} shards cannot be used either)" if errors[1:] else ""
        raise DataError(errors[0] + more)
    folder = next((entry.missing_labels for entry in found if entry.missing_labels), None)
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"the label folder {folder} does not exist. Write it with tools/assign_labels.py.")
        missing = [names[entry.shard] for entry in found if entry.missing_labels == folder]
        raise DataError(missing_labels(folder, missing, len(found)))


def _check_unlabelled(found: list[_Found], shards: Sequence[str], labels_dirs: Sequence[Path], allowed: float) -> None:
    lacking, total = sum(entry.num_unlabelled for entry in found), sum(entry.count for entry in found)
    if lacking <= allowed * total:
        return
    worst = max(found, key=lambda entry: entry.num_unlabelled)
    if not labels_dirs:
        raise DataError(
            f"{lacking} of {total} images have no caption (neither KEY.txt nor KEY.json), more than --max_skipped_fraction "
            f"{allowed:g} allows. Most of them in {shards[worst.shard]}: {worst.num_unlabelled} of {worst.count}, e.g. "
            f"{', '.join(worst.unlabelled)}. Train on tars with captions, or raise the fraction."
        )
    where = str(labels_dirs[0])
    if len(labels_dirs) > 1:
        numbers = [sum(entry.lacking_in[head] for entry in found) for head in range(len(labels_dirs))]
        where = " or ".join(f"{folder} ({number})" for folder, number in zip(labels_dirs, numbers, strict=True))
    raise DataError(
        f"{lacking} of {total} images have no label in {where}, more than --max_skipped_fraction {allowed:g} allows. "
        f"Most of them in {shards[worst.shard]}: {worst.num_unlabelled} of {worst.count}, e.g. "
        f"{', '.join(worst.unlabelled)}. Are these the labels of these tars? Write them with tools/assign_labels.py."
    )


class ShardReader:
    """Reads single samples of a `ShardTable`; each process has its own.

    memory_samples: samples whose places and labels may stay in memory at a time.
    """

    def __init__(self, table: ShardTable, memory_samples: int):
        self.table, self.memory_samples = table, memory_samples
        self._contents: OrderedDict[int, ShardContents] = OrderedDict()
        self._samples = 0
        self._files: OrderedDict[Path, int] = OrderedDict()

    def contents(self, shard: int) -> ShardContents:
        """Places and labels of a shard, read on first use."""
        if shard in self._contents:
            self._contents.move_to_end(shard)
            return self._contents[shard]
        contents = self._contents[shard] = self.table.load(shard)
        self._samples += len(contents)
        while self._samples > self.memory_samples and len(self._contents) > 1:
            _, oldest = self._contents.popitem(last=False)
            self._samples -= len(oldest)
        return contents

    def image_bytes(self, contents: ShardContents, index: int) -> bytes:
        """The encoded image. Raises DataError when the tar became shorter or unreadable."""
        return self._bytes(contents, index, int(contents.offsets[index]), int(contents.sizes[index]))

    def caption(self, contents: ShardContents, index: int) -> str:
        """The caption of an image. Raises CaptionError where there is none that can be used, DataError as `image_bytes`."""
        offset, size, kind = contents.captions[index].tolist()
        if kind < 0:
            raise CaptionError("no_caption", "its tar has neither KEY.txt nor KEY.json")
        return read_caption(EXTENSIONS[kind], self._bytes(contents, index, offset, size))

    def _bytes(self, contents: ShardContents, index: int, offset: int, size: int) -> bytes:
        try:
            # pread, not a map: a tar that shrinks while it is read then gives an error, where a map ends the process.
            data = os.pread(self._file(contents.path), size, offset)
        except OSError as error:
            raise DataError(f"cannot read {contents.path} (sample {contents.key(index)}): {error}") from None
        if len(data) != size:
            raise DataError(f"{contents.path} became shorter while it was read: sample {contents.key(index)} is cut")
        return data

    def close(self) -> None:
        """Closes the open tars."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, path: Path) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]
