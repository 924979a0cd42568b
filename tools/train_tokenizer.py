"""A small tokenizer of one's own captions, for runs on captions without CLIP's.

python tools/train_tokenizer.py --shards 'train/*.tar' --vocab_size 4096 --output tokenizer.json
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import TokenizerConfig
from mlcd_ds.data.captions import captions_of
from mlcd_ds.data.tars import expand_shards
from mlcd_ds.data.tokenizer import train_tokenizer
from mlcd_ds.errors import DataError
from mlcd_ds.files import make_folder
from mlcd_ds.topology import Topology


def train(config: TokenizerConfig) -> None:
    """Trains a byte-pair encoding on the captions of tars; writes one JSON file, which train.py takes as --tokenizer."""
    if not Topology.from_environment().is_main:  # one process does it
        return
    output = Path(config.output)
    if output.exists() and not config.force:
        raise DataError(f"{output} exists already: choose another --output, or replace it by --force")
    make_folder(output.parent)
    captions = captions_of(
        expand_shards(config.shards, config.allow_pipe), config.shard_cache, config.max_captions, config.allow_pipe
    )
    tokenizer = train_tokenizer(captions, config.vocab_size, output)
    print(f"{output}: {tokenizer.vocabulary:,} tokens (at most {config.vocab_size:,} were asked for)")


if __name__ == "__main__":
    cli.run(fire.Fire, train, TokenizerConfig)
