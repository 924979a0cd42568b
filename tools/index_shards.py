"""Tars to side-car indexes, `00012_index.npz` beside each: a run then starts without walking the tars.

python tools/index_shards.py --shards 'data/{00000..00099}.tar'
deepspeed --hostfile hosts tools/index_shards.py ...
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import IndexShardsConfig
from mlcd_ds.data.tar_index import index_shards


def main(config: IndexShardsConfig) -> None:
    """Writes the index of every tar that lacks a good one."""
    index_shards(config)


if __name__ == "__main__":
    cli.run(fire.Fire, main, IndexShardsConfig)
