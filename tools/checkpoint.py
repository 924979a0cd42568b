"""Looks after checkpoints that no run is using.

python tools/checkpoint.py verify --path run/                     # every file against its SHA-256
python tools/checkpoint.py list --path run/                       # step, date, size, ranks
python tools/checkpoint.py reshard --path run/ --world_size 16 --output_dir run16/
python tools/checkpoint.py consolidate --path run/ --output_dir weights/
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import checkpoint_tools, cli
from mlcd_ds.config import CheckpointPathConfig, ConsolidateConfig, ReshardConfig


def reshard(config: ReshardConfig) -> None:
    from mlcd_ds.engine import to_universal  # with DeepSpeed, which the other sub-commands do without

    checkpoint_tools.reshard(config, to_universal)


reshard.__doc__ = checkpoint_tools.reshard.__doc__

DOORS = {
    "verify": (checkpoint_tools.verify, CheckpointPathConfig),
    "list": (checkpoint_tools.list_checkpoints, CheckpointPathConfig),
    "reshard": (reshard, ReshardConfig),
    "consolidate": (checkpoint_tools.consolidate, ConsolidateConfig),
}
"""Sub-command: what it calls, and the settings that are its flags."""


if __name__ == "__main__":
    cli.run_one_of(fire.Fire, DOORS, __doc__)
