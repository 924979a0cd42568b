"""Long tests by force: kills training runs at random moments and compares what becomes of them.

python tools/soak.py kills --kills 100 --seed 0 --output_dir soak/ --output kills.json
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import KillsConfig
from mlcd_ds.soak import kills

DOORS = {"kills": (kills, KillsConfig)}
"""Sub-command: what it calls, and the settings that are its flags."""

if __name__ == "__main__":
    cli.run_one_of(fire.Fire, DOORS, __doc__)
