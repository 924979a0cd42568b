"""Features and centers to labels: the nearest centers of every image, one label shard per tar.

python tools/assign_labels.py --features features/ --centers centers/ --output_dir labels/ --top 8
deepspeed --hostfile hosts tools/assign_labels.py ... [--assign ivf --verify 1000]
python tools/assign_labels.py ... --tar_of_key 5      # published embeddings, whose files hold many tars each
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
    if topology.is_distributed:
        topology.start(config.timeout_minutes)
    summary = assign_labels(config, topology)
    if topology.is_main:
        figures = (
            f"; {summary.labels_per_image:.2f} labels an image, mean cosine of the nearest {summary.nearest:.4f}, of the "
            f"last {summary.last:.4f}"
        )
        dropped = (
            f"; {summary.dropped} images have no label, for their features cannot be used" if summary.dropped else ""
        )
        print(
            f"{config.output_dir}: {summary.images} images labelled now, {summary.already} shards were finished "
            f"before{figures if summary.images else ''}{dropped}"
        )
    if config.verify:
        share = collectives.on_main(topology, recall, config)
        if topology.is_main:
            print(
                f"{config.output_dir}: recall {share:.5f} of the exact {config.top} nearest, "
                f"on {config.verify} random images"
            )
    topology.stop()


if __name__ == "__main__":
    cli.run(fire.Fire, main, AssignConfig)
