"""One rank of test_kmeans.py: clusters a features folder by the cases it is given and saves what it found."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from mlcd_ds.clustering import kmeans
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.iterations import IterationStore
from mlcd_ds.clustering.kmeans import Iteration, KMeansState, SphericalKMeans
from mlcd_ds.clustering.two_level import TwoLevelKMeans
from mlcd_ds.topology import Topology


def main(features: Path, cases: Path, output: Path) -> None:
    topology = Topology.from_environment().start(timeout_minutes=1.0)
    kmeans.BLOCK_ROWS = 170  # several blocks a shard, so that every rank has some
    for number, case in enumerate(json.loads(cases.read_text())):
        resume, keep = None, None
        if "store" in case:
            store, last = IterationStore(Path(case.pop("store")), {"case": number}), case.pop("killed_after")
            resume = store.load() if store.verify() else None
            keep = killed_after(store, last)
        if "resume" in case:
            history = tuple(Iteration(**iteration) for iteration in case.pop("history"))
            resume = KMeansState(np.load(case.pop("resume")), history)
        levels = {name: case.pop(name) for name in ("coarse", "refinements", "probes") if name in case}
        two_level = case.pop("two_level", False)
        clustering = SphericalKMeans(**case, topology=topology)
        if two_level:
            clustering = TwoLevelKMeans(clustering, **levels)
        result = clustering.fit(FeatureFolder(features), lambda _: None, resume, keep)
        found = {
            "centers": result.centers_kd,
            "sizes": result.sizes_k,
            "objective": [iteration.objective for iteration in result.history],
            "moved": [-1 if iteration.moved is None else iteration.moved for iteration in result.history],
            "num_used": result.num_used,
        }
        np.savez(output / f"case{number}_world{topology.world_size}_rank{topology.rank}.npz", **found)
    topology.stop()


def killed_after(store: IterationStore, last: int):
    """Keeps states, and kills this process once `last` iterations are kept."""

    def keep(state: KMeansState) -> None:
        store.save(state)
        if len(state.history) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return keep


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
