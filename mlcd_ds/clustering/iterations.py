"""What k-means leaves after each iteration, so that a killed job goes on: centers, history, curves. Rank 0 alone writes.

centers/iterations/centers_00007.npy   float32 [k, d]
centers/iterations/aside_00007.npz     what a two-level clustering needs beside the centers
centers/iterations/state.json          made from what, after which iteration, hash; written last
centers/tensorboard/                   objective, empty clusters, share of features that moved
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mlcd_ds.clustering.kmeans import Iteration, KMeansState
from mlcd_ds.errors import DataError, differences
from mlcd_ds.files import make_folder, sha256, write_bytes, write_json


class IterationStore:
    """The iterations of one clustering in `folder`. made_from: what decides the centers; another run's are refused."""

    def __init__(self, folder: Path, made_from: dict):
        self.folder, self.made_from = folder, json.loads(json.dumps(made_from))
        self._writer = None

    def save(self, state: KMeansState) -> None:
        """Publishes the state: its files, then state.json, which names them; those before go last."""
        make_folder(self.folder)
        number = len(state.history)
        file = self.folder / f"centers_{number:05d}.npy"
        write_bytes(file, lambda out: np.save(out, state.centers_kd, allow_pickle=False))
        written = {
            "made_from": self.made_from,
            "file": file.name,
            "sha256": sha256(file),
            "history": [asdict(iteration) for iteration in state.history],
        }
        aside = self.folder / f"aside_{number:05d}.npz"
        if state.aside:
            write_bytes(aside, lambda out: np.savez(out, **state.aside))
            written |= {"aside": aside.name, "aside_sha256": sha256(aside)}
        write_json(self.folder / "state.json", written)
        for other in (*self.folder.glob("centers_*.npy"), *self.folder.glob("aside_*.npz")):
            if other not in (file, aside):
                other.unlink()
        self._curves(state.history)

    def verify(self) -> bool:
        """Whether there is a state to go on from, whole and of this clustering. Raises DataError when it is not."""
        file = self.folder / "state.json"
        if not file.exists():
            return False
        try:
            found = json.loads(file.read_text())
            centers = self.folder / found["file"]
            [Iteration(**iteration) for iteration in found["history"]]
            before, files = found["made_from"], [(centers, found["sha256"])]
            if "aside" in found:
                files.append((self.folder / found["aside"], found["aside_sha256"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} cannot be read ({error}): remove {self.folder} to begin anew") from None
        differs = differences(before, self.made_from)
        if differs:
            raise DataError(
                f"{self.folder} holds the iterations of another clustering ({differs}). Give the same settings, "
                "choose another --output_dir, or remove that folder."
            )
        for part, digest in files:
            if not part.is_file() or sha256(part) != digest:
                raise DataError(f"{part} is missing or damaged: remove {self.folder} to begin anew")
        return True

    def load(self) -> KMeansState:
        """The state that `verify` has passed; every rank reads it for itself."""
        found = json.loads((self.folder / "state.json").read_text())
        history = tuple(Iteration(**iteration) for iteration in found["history"])
        aside = {}
        if "aside" in found:
            with np.load(self.folder / found["aside"], allow_pickle=False) as arrays:
                aside = dict(arrays)
        return KMeansState(np.load(self.folder / found["file"], allow_pickle=False), history, aside)

    def remove(self) -> None:
        """Removes the iterations once the centers are published; the curves stay."""
        if self._writer is not None:
            self._writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _curves(self, history: tuple[Iteration, ...]) -> None:
        """The last iteration's points; all of them on the first call, for a killed run may have lost some."""
        new = history[-1:]
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder.parent / "tensorboard"), purge_step=0)
            new = history
        for iteration in new:
            values = {"objective": iteration.objective, "empty": iteration.empty, "moved": iteration.moved}
            group = "Cluster" if iteration.phase is None else f"Cluster_{iteration.phase}"
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, iteration.number)
        self._writer.flush()
