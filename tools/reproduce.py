"""CLIP, cd, mlc and mlcd with one budget on scenes64 and cifar10, and the ablations over l, r and k: a table with spread.

python tools/reproduce.py --root data/ --output_dir reproduce/ --steps 2500 --seeds 3
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ReproduceConfig
from mlcd_ds.evaluation import reproduction


def reproduce(config: ReproduceConfig) -> None:
    """Runs what has not been run yet, and prints the tables (also in output_dir/reproduce.md)."""
    print(reproduction.reproduce(config))


if __name__ == "__main__":
    cli.run(fire.Fire, reproduce, ReproduceConfig)
