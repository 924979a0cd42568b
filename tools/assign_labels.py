"""Features and centers to labels: the nearest centers of every image, one label shard per tar.

python tools/assign_labels.py --features features/ --centers centers/ --output_dir labels/ --top 8
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.clustering.assign import assign_labels
from mlcd_ds.config import AssignConfig
from mlcd_ds.topology import Topology


def main(config: AssignConfig) -> None:
    """Writes the nearest centers of every image as label shards."""
    topology = Topology.from_environment()
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


if __name__ == "__main__":
    cli.run(fire.Fire, main, AssignConfig)
