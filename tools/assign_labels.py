"""Features and centers to labels: the nearest centers of every image, one label shard per tar.

python tools/assign_labels.py --features features/ --centers centers/ --output_dir labels/ --top 8
deepspeed --hostfile hosts tools/assign_labels.py ... [--assign ivf --verify 1000]
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli, collectives
from mlcd_ds.clustering.assign import assign_labels, recall
from mlcd_ds.config import AssignConfig
from mlcd_ds.topology import Topology


def main(config: AssignConfig) -> None:
    """Writes the nearest centers of every image as label shards."""
    topology = Topology.from_environment()
    if config.verify:
        topology.start(config.timeout_minutes)  # rank 0 verifies when all have written
    summary = assign_labels(config, topology)
    if topology.is_main:
        figures = (
            f"; {summary.labels_per_image:.2f} labels an image, mean cosine of the nearest {summary.nearest:.4f}, of the "
            f"last {summary.last:.4f}"
        )
        print(
            f"{config.output_dir}: this rank labelled {summary.images} images now, {summary.already} shards were finished "
            f"before{figures if summary.images else ''}"
        )
    if config.verify:
        collectives.barrier(topology)
        share = collectives.on_main(topology, recall, config)
        if topology.is_main:
            print(
                f"{config.output_dir}: recall {share:.5f} of the exact {config.top} nearest, "
                f"on {config.verify} random images"
            )
        topology.stop()


if __name__ == "__main__":
    cli.run(fire.Fire, main, AssignConfig)
