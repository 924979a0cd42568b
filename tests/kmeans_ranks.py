"""The same clusterings by one, two and three ranks, each a process (kmeans_worker.py)."""

import json
from pathlib import Path

import numpy as np
from processes import ROOT, run_script


def cluster_on_ranks(folder: Path, cases: list[dict]) -> list[tuple[dict, list[dict]]]:
    """(what one process found, what each rank of two and of three found) of each case; the features lie in folder/f.

    Asserts that sizes are the same everywhere, centers and objectives but for rounding, and that all wanted features were
    used, of 2000.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    for world_size in (1, 2, 3):
        arguments = [ROOT / "tests" / "kmeans_worker.py", folder / "f", folder / "cases.json", folder]
        ended = run_script(world_size, arguments)
        assert [rank.code for rank in ended] == [0] * world_size, ended[0].output[-3000:]
    results = []
    for number, case in enumerate(cases):
        alone = np.load(folder / f"case{number}_world1_rank0.npz")
        assert alone["num_used"] == min(2000, case["k"] * case["max_points_per_center"])
        others = [
            np.load(folder / f"case{number}_world{world_size}_rank{rank}.npz")
            for world_size in (2, 3)
            for rank in range(world_size)
        ]
        for found in others:
            np.testing.assert_allclose(found["centers"], alone["centers"], atol=2e-5)
            np.testing.assert_allclose(found["objective"], alone["objective"], rtol=1e-6)
            assert np.array_equal(found["sizes"], alone["sizes"])
        results.append((alone, others))
    return results
