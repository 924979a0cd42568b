"""centers/: `centers.npy` float32 [k, d] with unit rows, and `centers.json` with their provenance."""

import json
from pathlib import Path

import numpy as np
import torch

from mlcd_ds.errors import DataError
from mlcd_ds.files import sha256


def centers_file(path: str | Path) -> Path:
    """`path` itself if it is a .npy, else the centers.npy in the folder `path`. Raises DataError when it is not there."""
    path = Path(path)
    file = path if path.suffix == ".npy" else path / "centers.npy"
    if not file.is_file():
        raise DataError(f"{file} does not exist: give the folder that tools/cluster.py wrote, or a centers.npy")
    return file


def centers_hash(path: str | Path) -> str:
    """The hash that label shards carry: SHA-256 of centers.npy, from centers.json where that stands beside it."""
    file = centers_file(path)
    described = file.with_name("centers.json")
    if file.name == "centers.npy" and described.is_file():
        return json.loads(described.read_text())["hash"]
    return sha256(file)


def load_center_rows(path: str | Path, start: int, stop: int, num_classes: int, dim: int) -> torch.Tensor:
    """Global rows start..stop as float32 [stop - start, dim]; reads only these from the disk.

    Raises DataError when the file is no [num_classes, dim] array.
    """
    file = centers_file(path)
    try:
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{file} is no readable .npy: {error}") from None
    if rows.shape != (num_classes, dim):
        raise DataError(
            f"{file} has shape {list(rows.shape)}, but the labels have {num_classes} classes and the encoder's embedding "
            f"{dim} dimensions. Leave --centers out to start from random centers, or choose a --model with that embedding."
        )
    return torch.from_numpy(np.array(rows[start:stop], dtype=np.float32))
