"""One rank of test_kernels.py: the sharded head with the kernels, against the dense definition in float64."""

import sys
from pathlib import Path

import torch
from test_kernels import case

from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.topology import Topology


def main(folder: Path) -> None:
    topology = Topology.from_environment().start(timeout_minutes=1.0)
    embeddings, centers, labels = case(64)
    half = -(-len(embeddings) // topology.world_size)
    own = slice(topology.rank * half, (topology.rank + 1) * half)
    results = {}
    for precision in ("float32", "bfloat16"):
        options = {"scale": 16.0, "sample_rate": 0.5, "workspace_mb": 0.02, "seed": 4, "precision": precision}
        head = PartialFC(len(centers), 64, topology, kernels="triton", **options)
        head.centers.copy_(centers[head.start : head.stop])
        mine = embeddings[own].float().to(topology.device).requires_grad_()
        out = head(mine, labels[own], step=2, capacity=half)
        out.loss.backward()
        (gradient,) = head.take_gradients()
        results[precision] = {
            "loss": out.loss.item(),
            "embeddings": mine.grad.cpu() / topology.world_size,
            "rows": gradient.rows_S.cpu() + head.start,
            "centers": gradient.values_SD.cpu(),
        }
    torch.save(results, folder / f"{topology.rank}.pt")
    topology.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
