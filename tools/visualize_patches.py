"""Principal components of an encoder's patches as colours, for image files or tars, at any resolution.

python tools/visualize_patches.py --model run:run/ --images 'photos/*.jpg' --image_size 448 --output_dir pictures/
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import VisualizeConfig
from mlcd_ds.evaluation.patches import CONTACT_SHEET, visualize
from mlcd_ds.topology import Topology


def visualize_patches(config: VisualizeConfig) -> None:
    """Draws what an encoder tells apart inside images: a PNG each, and a sheet with all of them."""
    topology = Topology.from_environment()
    if not topology.is_main:  # one process does it
        return
    made = visualize(config, topology.device)
    _, rows, columns, _ = made.colours.shape
    print(
        f"{Path(config.output_dir) / CONTACT_SHEET}: {len(made.names)} images of {made.images.shape[1]} pixels, {rows} x "
        f"{columns} patches, {made.foreground:.0%} of them foreground; three components have {made.explained:.0%} of "
        f"its variance"
    )


if __name__ == "__main__":
    cli.run(fire.Fire, visualize_patches, VisualizeConfig)
