"""centers/: `centers.npy` float32 [k, d] with unit rows, and `centers.json` with their provenance, written last.

Also a bare centers.npy from elsewhere, which then is its own provenance: its hash.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlcd_ds.errors import DataError
from mlcd_ds.files import make_folder, sha256, write_bytes, write_json


@dataclass(frozen=True)
class Centers:
    """array: float32 [k, d], memory-mapped. hash: SHA-256 of the file. feature_model: what they are clusters of."""

    array: np.ndarray
    hash: str
    feature_model: str

    @staticmethod
    def load(path: str | Path) -> "Centers":
        """From a folder of tools/cluster.py, or a .npy. Raises DataError when it is missing, unfinished or no [k, d]."""
        path = Path(path)
        file = path if path.suffix == ".npy" else path / "centers.npy"
        if not file.is_file():
            raise DataError(f"{file} does not exist: give the folder that tools/cluster.py wrote, or a centers.npy")
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise DataError(f"{file} is no readable .npy: {error}. Cluster again with tools/cluster.py.") from None
        if array.ndim != 2 or array.dtype != np.float32:
            raise DataError(f"{file} holds {array.dtype} {list(array.shape)}, expected float32 [centers, dimensions]")
        if path.suffix == ".npy":
            return Centers(array, sha256(file), f"unknown:{path.name}")
        described = read_description(path)
        if described is None:
            raise DataError(f"{path / 'centers.json'} does not exist: tools/cluster.py has not finished there")
        return Centers(array, described["hash"], described["feature_model"])


def read_description(folder: Path) -> dict | None:
    """centers.json of a folder; None when clustering has not finished there. Raises DataError when it is damaged."""
    file = folder / "centers.json"
    if not file.exists():
        return None
    try:
        described = json.loads(file.read_text())
        described["hash"], described["feature_model"]
        return described
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error}). Remove the folder and cluster again.") from None


def save_centers(folder: Path, centers_kd: np.ndarray, description: dict) -> str:
    """Writes centers.npy, then centers.json = `description` with the hash, which is returned."""
    make_folder(folder)
    file = folder / "centers.npy"
    write_bytes(file, lambda out: np.save(out, centers_kd.astype(np.float32), allow_pickle=False))
    digest = sha256(file)
    write_json(folder / "centers.json", description | {"hash": digest})
    return digest


def load_center_rows(centers: Centers, start: int, stop: int, num_classes: int, dim: int) -> torch.Tensor:
    """Global rows start..stop as float32 [stop - start, dim]; reads only these from the disk.

    Raises DataError when there are not `num_classes` rows of `dim` values.
    """
    if centers.array.shape != (num_classes, dim):
        raise DataError(
            f"--centers have shape {list(centers.array.shape)}, but the labels have {num_classes} classes and the encoder's "
            f"embedding {dim} dimensions. Leave --centers out to start from random centers, or choose a --model with that "
            "embedding."
        )
    return torch.from_numpy(np.array(centers.array[start:stop]))
