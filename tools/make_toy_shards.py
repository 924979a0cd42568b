"""Makes toy image shards without a download: scenes of handwritten digits with captions and true classes.

python tools/make_toy_shards.py --output_dir toy/     # writes toy/train/*.tar and toy/test/*.tar
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ToyShardsConfig
from mlcd_ds.data.toy import write_toy_shards
from mlcd_ds.topology import Topology


def make_toy_shards(config: ToyShardsConfig) -> None:
    """Composes scenes of 1-4 handwritten digits into WebDataset tars, in img2dataset's layout."""
    if not Topology.from_environment().is_main:  # seconds of work: one process does it
        return
    written = write_toy_shards(config)
    print(
        f"{config.num_train} train and {config.num_test} test scenes of {config.image_size} pixels "
        f"{'written to' if written else 'are already in'} {config.output_dir}"
    )


if __name__ == "__main__":
    cli.run(fire.Fire, make_toy_shards, ToyShardsConfig)
