"""Thousands of damaged tars and label files through the loader: each must end in a counted skip or a clear error.

python tools/soak_mutations.py --count 6000
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.benchmarks.mutations import soak_mutations
from mlcd_ds.config import SoakMutationsConfig

if __name__ == "__main__":
    cli.run(fire.Fire, soak_mutations, SoakMutationsConfig)
