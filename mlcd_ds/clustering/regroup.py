"""Labels by tar where features files do not hold one tar each: published ones have up to a million rows of many tars.

    labels/pieces/0.000000000.arrow   labels of up to PIECE_ROWS rows of one features file, sorted by tar and key
    labels/00012.parquet              a tar's slices of all pieces, sorted by key; written when all pieces are there
    labels/grouped.json               the tars with their numbers of images; written last, then the pieces are removed

Features are read once, in their order; what is sorted and looked up are labels, a thirtieth of their size. A rank holds
one piece in memory, then one tar, and where each tar begins in each piece.

Shapes: n rows of a piece or tar, l labels an image.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.data.labels import LabelsInfo
from mlcd_ds.errors import DataError
from mlcd_ds.files import make_folder, write_bytes, write_json

PIECE_ROWS = 1_000_000
OPEN_PIECES = 64
"""Memory-mapped pieces that one process keeps open."""
_METADATA_KEY = b"mlcd_ds.piece"


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of one features file."""

    name: str
    start: int
    stop: int

    @property
    def file_name(self) -> str:
        """Of its labels."""
        return f"{self.name}.{self.start:09d}.arrow"


@dataclass(frozen=True)
class Slice:
    """Where a tar's rows stand in a piece."""

    piece: Piece
    first: int
    count: int


def pieces_of(features: FeatureFolder) -> list[Piece]:
    """All features, in the order of their files."""
    return [
        Piece(name, start, min(start + PIECE_ROWS, rows))
        for name, rows in zip(features.names, features.rows, strict=True)
        for start in range(0, rows, PIECE_ROWS)
    ]


def tar_of(key: str, characters: int, where: object) -> str:
    """The tar's name that a key begins with. Raises DataError for a key that is too short or would name another folder."""
    name = key[:characters]
    if len(name) < characters or "/" in name or name.startswith("."):
        raise DataError(
            f"{where}: the key {key!r} does not begin with the {characters} characters of a tar's name: is "
            "--tar_of_key right?"
        )
    return name


class PieceStore:
    """The labels of pieces in `folder`, of one set of centers and features."""

    def __init__(self, folder: Path, info: LabelsInfo, fingerprint: str, characters: int):
        self.folder, self.info, self.characters = folder / "pieces", info, characters
        self.made_from = json.loads(info.to_json()) | {"features": fingerprint, "tar_of_key": characters}
        self._opened = lru_cache(OPEN_PIECES)(self._open)

    def write(
        self, piece: Piece, keys: Sequence[str], labels_nl: np.ndarray, cosines_nl: np.ndarray, dropped: int
    ) -> None:
        """Sorts and publishes a piece. labels: int32, NO_LABEL as padding; cosines: float16. dropped: rows without use."""
        unsorted = pa.array(keys, pa.string())
        order = pc.sort_indices(unsorted)  # a tar's name begins its keys, so its rows come together
        key = unsorted.take(order)
        order = order.to_numpy()
        begins: dict[str, int] = {}
        for place, text in enumerate(key.to_pylist()):
            begins.setdefault(tar_of(text, self.characters, piece.name), place)
        width = self.info.num_positives
        columns = {
            "key": key,
            "label": pa.FixedSizeListArray.from_arrays(pa.array(labels_nl[order].ravel(), pa.int32()), width),
            "cosine": pa.FixedSizeListArray.from_arrays(pa.array(cosines_nl[order].ravel(), pa.float16()), width),
        }
        said = {"made_from": self.made_from, "rows": len(keys), "dropped": dropped, "begins": begins}
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(said)})

        def save(file) -> None:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)

        make_folder(self.folder)
        write_bytes(self.folder / piece.file_name, save)

    def said(self, piece: Piece) -> dict | None:
        """What a finished piece says of itself; None for one that is missing, damaged or of other centers or features."""
        try:
            with pa.OSFile(str(self.folder / piece.file_name)) as file:
                said = json.loads(pa.ipc.open_file(file).schema.metadata[_METADATA_KEY])
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            return None  # labelled anew
        right = said["made_from"] == self.made_from and said["rows"] == piece.stop - piece.start
        return said if right else None

    def slices(self, pieces: Sequence[Piece]) -> tuple[dict[str, list[Slice]], int]:
        """(where each tar's rows are, by name in order; rows without features). Raises DataError for an unfinished piece."""
        found: dict[str, list[Slice]] = {}
        dropped = 0
        for piece in pieces:
            said = self.said(piece)
            if said is None:
                raise DataError(f"{self.folder / piece.file_name} is missing or damaged: run the same command again")
            dropped += said["dropped"]
            edges = [*said["begins"].values(), said["rows"]]
            for tar, (first, end) in zip(said["begins"], itertools.pairwise(edges), strict=True):
                found.setdefault(tar, []).append(Slice(piece, first, end - first))
        return dict(sorted(found.items())), dropped

    def read(self, tar: str, slices: Sequence[Slice]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(keys in order, labels [n, l], cosines [n, l]) of a tar. Raises DataError for a key that comes twice."""
        tables = [self._opened(part.piece.file_name).slice(part.first, part.count) for part in slices]
        table = pa.concat_tables(tables).combine_chunks()
        keys = table.column("key").to_pylist()
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        keys = [keys[row] for row in order]
        twice = next((key for key, after in itertools.pairwise(keys) if key == after), None)
        if twice is not None:
            files = ", ".join(sorted({part.piece.name for part in slices})[:3])
            raise DataError(
                f"the key {twice!r} comes twice among the features of tar {tar!r} (in the files {files}): an image has one "
                "feature. Take one of the rows out, or the copy of its file."
            )
        shape = (len(keys), self.info.num_positives)
        labels_nl, cosines_nl = (_flat(table.column(name)).reshape(shape)[order] for name in ("label", "cosine"))
        return keys, labels_nl, cosines_nl

    def _open(self, file_name: str) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self.folder / file_name))).read_all()

    def finish(self, tars: dict[str, int], dropped: int) -> None:
        """Notes what is there when all label shards are, and removes the pieces."""
        write_json(self.folder.parent / "grouped.json", self.made_from | {"dropped": dropped, "tars": tars})
        self.remove()

    def remove(self) -> None:
        """Removes the pieces."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(self) -> dict | None:
        """`tars` and `dropped` of a grouping that has finished; None where there is none of these features and centers."""
        file = self.folder.parent / "grouped.json"
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text())
            same = {name: found[name] for name in self.made_from} == self.made_from
            return found if same and isinstance(found["tars"], dict) and isinstance(found["dropped"], int) else None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} cannot be read ({error}): remove it, and run the same command again") from None


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
