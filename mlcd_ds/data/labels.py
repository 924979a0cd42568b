"""Label shards: `00012.parquet` beside `00012.tar`, the nearest centers of every image.

The metadata also holds a SHA-256 of all rows, so that no flipped bit becomes another label (files without one, of earlier
versions, are read, too).

Columns: `key` string, `label` list<int32> nearest first, `cosine` list<float16>. The schema's metadata says which
centers they are of; files of different centers are never mixed. Joined with the tar by key, never by row number.

Shapes: n images of a shard, l labels stored per image.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.data.storage import T, persistently
from mlcd_ds.errors import DataError
from mlcd_ds.files import write_bytes

FORMAT_VERSION = 1
_METADATA_KEY = b"mlcd_ds.labels"
_DROPPED_KEY = b"mlcd_ds.dropped"
_DIGEST_KEY = b"mlcd_ds.sha256"
_SCHEMA = pa.schema(
    [("key", pa.string()), ("label", pa.list_(pa.int32())), ("cosine", pa.list_(pa.float16()))],
)
_CURE = "Write the labels again with tools/assign_labels.py."


@dataclass(frozen=True)
class LabelsInfo:
    """What a label shard is of: k centers, at most l labels an image, which centers, features of which model."""

    num_classes: int
    num_positives: int
    centers_hash: str
    feature_model: str
    format_version: int = FORMAT_VERSION

    @staticmethod
    def from_json(text: str | bytes) -> "LabelsInfo":
        """Inverse of `to_json`; raises ValueError for anything else."""
        fields = json.loads(text)
        names = {"num_classes", "num_positives", "centers_hash", "feature_model", "format_version"}
        if not isinstance(fields, dict) or set(fields) != names:
            raise ValueError("its metadata does not hold the fields " + ", ".join(sorted(names)))
        counts = [fields[name] for name in ("num_classes", "num_positives", "format_version")]
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError("num_classes, num_positives and format_version must be whole numbers above 0")
        return LabelsInfo(**fields)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class LabelShard:
    """keys: n image keys. labels: int32 [n, l], nearest first, NO_LABEL as padding. cosines: float16 [n, l], 0 there."""

    keys: list[str]
    labels: np.ndarray
    cosines: np.ndarray
    info: LabelsInfo


def label_path(folder: str | Path, shard: str) -> Path:
    """Where the labels of the shard named `shard` lie."""
    return Path(folder) / f"{shard}.parquet"


def write_label_shard(
    path: str | Path, keys: Sequence[str], labels: np.ndarray, cosines: np.ndarray, info: LabelsInfo, dropped: int = 0
) -> None:
    """Writes a label shard under a temporary name, then renames it.

    labels: int32 [n, l] nearest first, padded with NO_LABEL at the end of a row; cosines: float16 [n, l]. dropped: how many
    rows have no label because their features could not be used; noted in the schema's metadata. The same
    input gives the same bytes. Raises ValueError where shapes or labels do not fit `info`: a fault of the caller.
    """
    path = Path(path)
    labels, cosines = np.asarray(labels, np.int32), np.asarray(cosines, np.float16)
    shape = (len(keys), info.num_positives)
    if labels.shape != shape or cosines.shape != shape:
        raise ValueError(f"labels {labels.shape} and cosines {cosines.shape} must both be {shape}")
    present = labels != NO_LABEL
    if (present[:, 1:] & ~present[:, :-1]).any():
        raise ValueError("padding may only stand at the end of a row of labels")
    problem = _check_values(list(keys), labels, info)
    if problem:
        raise ValueError(problem)
    offsets = np.concatenate([[0], present.sum(1).cumsum()]).astype(np.int32)
    columns = [
        pa.array(list(keys), pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(labels[present], pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(cosines[present], pa.float16())),
    ]
    digest = _digest(list(keys), labels, np.where(present, cosines, np.float16(0)), info)
    metadata = {_METADATA_KEY: info.to_json().encode(), _DIGEST_KEY: digest}
    metadata |= {_DROPPED_KEY: str(dropped).encode()} if dropped else {}
    table = pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, lambda file: pq.write_table(table, file, compression="zstd"))


def read_label_shard(path: str | Path) -> LabelShard:
    """Reads and checks a label shard.

    Raises DataError, naming the file, when it is missing, damaged (also where only its SHA-256 shows it), not a label
    shard, or holds a label outside 0..k-1, a row longer than l, a key twice, or a cosine that is not a number.
    """
    path = Path(path)

    def parse(file: BinaryIO) -> pa.Table:
        return pq.read_table(file, columns=_SCHEMA.names, use_threads=False)

    table = _read(path, parse)
    info = _info(path, table.schema)
    try:
        keys = table.column("key").to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"the label file {path} holds a key that is no text: {error}. {_CURE}") from None
    if None in keys:
        raise DataError(f"the label file {path} holds nulls. {_CURE}")
    labels = _padded(path, table.column("label"), info, NO_LABEL, np.int32)
    cosines = _padded(path, table.column("cosine"), info, 0, np.float16)
    problem = _check_values(keys, labels, info)
    if not problem and not np.isfinite(cosines).all():
        row = int(np.nonzero(~np.isfinite(cosines).all(1))[0][0])
        problem = f"the cosines of key {keys[row]!r} are not all numbers"
    stated = table.schema.metadata.get(_DIGEST_KEY)
    if not problem and stated is not None and stated != _digest(keys, labels, cosines, info):
        problem = "its rows do not match their SHA-256: the file was damaged after it was written"
    if problem:
        raise DataError(f"the label file {path}: {problem}. {_CURE}")
    return LabelShard(keys, labels, cosines, info)


def _digest(keys: Sequence[str], labels: np.ndarray, cosines: np.ndarray, info: LabelsInfo) -> bytes:
    """Hexadecimal SHA-256 of what a reader gets: info, keys, labels int32 [n, l] and cosines float16 [n, l], padded."""
    digest = hashlib.sha256(info.to_json().encode())
    digest.update("".join(f"{len(key)} {key}" for key in keys).encode())
    digest.update(np.ascontiguousarray(labels, "<i4").tobytes())
    digest.update(np.ascontiguousarray(cosines, "<f2").tobytes())
    return digest.hexdigest().encode()


def read_label_info(path: str | Path) -> tuple[LabelsInfo, int]:
    """(what the shard is of, number of rows), from the file's footer alone. Raises DataError naming the file."""
    footer = _read(Path(path), pq.read_metadata)
    return _info(Path(path), footer.schema.to_arrow_schema()), footer.num_rows


def read_dropped(path: str | Path) -> int:
    """How many rows of a label shard have no label because their features could not be used; from its footer."""
    return int((_read(Path(path), pq.read_schema).metadata or {}).get(_DROPPED_KEY, b"0"))


def _read(path: Path, parse: Callable[[BinaryIO], T]) -> T:
    """`parse` of the open file, again where a disk or a file server fails. Raises DataError naming the file."""

    def read() -> T:
        with path.open("rb") as file:
            return parse(file)

    try:
        return persistently(read, f"the label file {path}")
    except FileNotFoundError:
        raise DataError(f"the label file {path} does not exist. {_CURE}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"the label file {path} cannot be read: {error}. {_CURE}") from None


def _info(path: Path, schema: pa.Schema) -> LabelsInfo:
    metadata = (schema.metadata or {}).get(_METADATA_KEY)
    types = dict(zip(schema.names, schema.types, strict=True))
    if metadata is None or any(types.get(name) != _SCHEMA.field(name).type for name in _SCHEMA.names):
        raise DataError(
            f"{path} is not a label file: it lacks our metadata, or the columns key string, label list<int32>, cosine "
            f"list<float16>. {_CURE}"
        )
    try:
        info = LabelsInfo.from_json(metadata)
    except ValueError as error:
        raise DataError(f"the label file {path} has bad metadata: {error}. {_CURE}") from None
    if info.format_version != FORMAT_VERSION:
        raise DataError(
            f"the label file {path} has format version {info.format_version}, this program reads {FORMAT_VERSION}. "
            f"{_CURE}"
        )
    return info


def _padded(path: Path, column: pa.ChunkedArray, info: LabelsInfo, fill: int, dtype: type) -> np.ndarray:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # no rows at all
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], column.type)
    values = lists.flatten()
    if lists.null_count or values.null_count:
        raise DataError(f"the label file {path} holds nulls. {_CURE}")
    counts = np.diff(lists.offsets.to_numpy())
    if len(counts) and counts.max() > info.num_positives:
        raise DataError(
            f"the label file {path} has a row of {counts.max()} entries, l is {info.num_positives}. {_CURE}"
        )
    out = np.full((len(lists), info.num_positives), fill, dtype)
    out[np.arange(info.num_positives) < counts[:, None]] = values.to_numpy(zero_copy_only=False)
    return out


def _check_values(keys: list[str], labels: np.ndarray, info: LabelsInfo) -> str | None:
    """What is wrong with keys or labels, None if nothing."""
    if len(set(keys)) != len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        return f"the key {twice!r} comes twice"
    bad = (labels >= info.num_classes) | (labels < NO_LABEL)
    if bad.any():
        row, column = (int(axis[0]) for axis in np.nonzero(bad))
        return f"key {keys[row]!r} has label {labels[row, column]}, outside 0..{info.num_classes - 1}"
    return None


def draw_positives(labels_l: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """[count] of an image's labels [l], drawn uniformly without replacement, the nearest still first.

    NO_LABEL is not drawn: it fills up the end where the image has fewer than `count` labels.
    """
    present = labels_l[labels_l != NO_LABEL]
    drawn = np.full(count, NO_LABEL, labels_l.dtype)
    if len(present) > count:
        present = present[np.sort(generator.permutation(len(present))[:count])]
    drawn[: len(present)] = present
    return drawn


def check_label_folder(
    folder: str | Path, shards: Sequence[str], num_positives: int
) -> tuple[LabelsInfo, tuple[int, ...]]:
    """(what the labels are of, rows per shard) of the shards named `shards`; reads footers only.

    Raises DataError when files are missing (how many, which), are of different centers, models or versions, or store
    fewer labels an image than `num_positives`.
    """
    folder = Path(folder)
    if not shards:
        raise DataError("no shards, so no labels to check")
    if not folder.is_dir():
        raise DataError(f"the label folder {folder} does not exist. {_CURE}")
    missing = [shard for shard in shards if not label_path(folder, shard).is_file()]
    if missing:
        raise DataError(missing_labels(folder, missing, len(shards)))
    found = [read_label_info(label_path(folder, shard)) for shard in shards]
    check_same_labels([(label_path(folder, shard), info) for shard, (info, _) in zip(shards, found, strict=True)])
    check_enough_labels(folder, found[0][0], num_positives)
    return found[0][0], tuple(rows for _, rows in found)


def missing_labels(folder: str | Path, missing: Sequence[str], of: int) -> str:
    """The message for shards without a label file."""
    return (
        f"{len(missing)} of {of} shards have no label file in {folder}, e.g. "
        f"{', '.join(label_path('', shard).name for shard in missing[:3])}. Run tools/assign_labels.py for them (it goes "
        "on where it stopped), or take the shards out of --shards."
    )


def check_same_labels(infos: Sequence[tuple[Path, LabelsInfo]]) -> None:
    """Raises DataError, naming two files and what differs, unless all label files are of the same centers."""
    first_path, first = infos[0]
    for path, info in infos:
        if info != first:
            differs = ", ".join(
                f"{name} {value!r} against {getattr(info, name)!r}"
                for name, value in asdict(first).items()
                if value != getattr(info, name)
            )
            raise DataError(f"the label files {first_path} and {path} do not belong together: {differs}. {_CURE}")


def check_enough_labels(folder: str | Path, info: LabelsInfo, num_positives: int) -> None:
    """Raises DataError when an image has fewer labels stored than are asked for."""
    if info.num_positives < num_positives:
        raise DataError(
            f"the labels in {folder} store {info.num_positives} centers an image, --num_positives asks for "
            f"{num_positives}: assign them again with --top {num_positives}, or train with --num_positives "
            f"{info.num_positives}."
        )
