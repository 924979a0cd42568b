"""What the parts cost: measurements against what cannot be undercut.

python tools/bench.py head --shapes B256_K200000_D512_r0.1 --ranks 2 --output head.json
python tools/bench.py kmeans --output kmeans.json
python tools/bench.py data --shards 'photos/*.tar' --output data.json
python tools/bench.py step --presets vit_l14 --checkpointing none,all,selective --compile both --output step.json
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.benchmarks.data import bench_data
from mlcd_ds.benchmarks.head import bench_head
from mlcd_ds.benchmarks.kmeans import bench_kmeans
from mlcd_ds.config import BenchDataConfig, BenchHeadConfig, BenchKMeansConfig, BenchStepConfig


def bench_step(config: BenchStepConfig) -> dict:
    """Whole optimizer steps, ours against transformers' encoder in the same engine."""
    from mlcd_ds.benchmarks.step import bench_step  # DeepSpeed, which prints when it is imported

    return bench_step(config)


DOORS = {
    "head": (bench_head, BenchHeadConfig),
    "kmeans": (bench_kmeans, BenchKMeansConfig),
    "data": (bench_data, BenchDataConfig),
    "step": (bench_step, BenchStepConfig),
}
"""Sub-command: what it calls, and the settings that are its flags."""


if __name__ == "__main__":
    cli.run_one_of(fire.Fire, DOORS, __doc__)
