"""What the parts cost: measurements against what cannot be undercut.

python tools/bench.py head --shapes B256_K200000_D512_r0.1 --ranks 2 --output head.json
python tools/bench.py data --shards 'photos/*.tar' --output data.json
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.benchmarks.data import bench_data
from mlcd_ds.benchmarks.head import bench_head
from mlcd_ds.config import BenchDataConfig, BenchHeadConfig
from mlcd_ds.errors import ConfigError

DOORS = {"head": (bench_head, BenchHeadConfig), "data": (bench_data, BenchDataConfig)}
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
            ConfigError(f"{what}: expected one of {', '.join(DOORS)}, like python tools/bench.py {next(iter(DOORS))}")
        )
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    cli.run(fire.Fire, *DOORS[name])


if __name__ == "__main__":
    main()
