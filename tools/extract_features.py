"""Features of all images in a list of tars.

python tools/extract_features.py --shards 'data/{00000..00099}.tar' --model hf:openai/clip-vit-large-patch14 \\
    --output_dir features/        # or: deepspeed --hostfile hosts tools/extract_features.py ...
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.clustering.features import extract_features
from mlcd_ds.config import FeaturesConfig
from mlcd_ds.topology import Topology


def main(config: FeaturesConfig) -> None:
    """Writes the features of all images in the shards, one file per tar, in clip-retrieval's layout."""
    topology = Topology.from_environment()
    if topology.is_distributed:
        topology.start(config.timeout_minutes)
    found = extract_features(config, topology)
    if topology.is_main:
        skipped = f", {found['skipped']} skipped ({'; '.join(found['skipped_names'])})" if found["skipped"] else ""
        textless = f", {found['without_text']} without a text" if found["without_text"] else ""
        print(
            f"{config.output_dir}: {found['shards']} shards, {found['dim']} dimensions of {found['model']}; this rank: "
            f"{found['images']} images now, {found['already']} shards were finished before{skipped}{textless}"
        )
    topology.stop()


if __name__ == "__main__":
    cli.run(fire.Fire, main, FeaturesConfig)
