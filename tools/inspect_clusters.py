"""A look at clusters: sizes, cosines, overlap, true classes and thumbnails, as one HTML page that loads nothing.

python tools/inspect_clusters.py --shards 'laion400m/{00000..00099}.tar' --labels labels/ --centers centers/ \\
    --output clusters.html
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.clustering.inspect import inspect_clusters
from mlcd_ds.config import InspectConfig
from mlcd_ds.topology import Topology


def main(config: InspectConfig) -> None:
    """Writes a page about the clusters that the labels are of."""
    if not Topology.from_environment().is_main:  # one process does it
        return
    report = inspect_clusters(config)
    k, statistics = report.info.num_classes, report.statistics
    parts = [
        f"{config.output}: {statistics.num_images} images, {k} clusters",
        f"{report.empty / k:.2%} empty",
        f"{len(report.giants) / k:.2%} giant",
        f"mean cosine of two labels of an image {report.overlap.mean_cosine:.3f}",
    ]
    if report.classes:
        found, chance = report.classes.agreement, report.classes.shuffled
        parts.append(
            f"purity {found.purity:.3f} (by chance {chance.purity:.3f}), NMI {found.nmi:.3f} ({chance.nmi:.3f})"
        )
    if report.unreadable:
        parts.append(f"{report.unreadable} of {len(report.images)} thumbnails could not be made")
    parts.append(f"{Path(config.output).stat().st_size / 1e6:.1f} MB")
    print("; ".join(parts))


if __name__ == "__main__":
    cli.run(fire.Fire, main, InspectConfig)
