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
from mlcd_ds.errors import ConfigError


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


def main() -> None:
    """The first argument names the sub-command; the rest are its flags."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("--help", "-h", "help"):
        print(f"{__doc__}\nsub-commands: {', '.join(DOORS)} (each has --help)")
        return
    if name not in DOORS:
        what = "no sub-command" if name is None else f"no sub-command {name!r}"
        cli.fail(
            ConfigError(f"{what}: expected one of {', '.join(DOORS)}, like python tools/checkpoint.py list --path run/")
        )
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    cli.run(fire.Fire, *DOORS[name])


if __name__ == "__main__":
    main()
