"""Weighted nearest neighbours on frozen features, on one set or on all 27.

python tools/knn.py --model run:run/ --train_shards 'train/*.tar' --test_shards 'test/*.tar' --output knn.json
deepspeed --hostfile hosts tools/knn.py --model run:run/ --root sets/ --datasets imagenet1k --cache features/ \\
    --output_dir results/
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import KnnConfig
from mlcd_ds.evaluation.knn import knn_sets
from mlcd_ds.evaluation.results import Result
from mlcd_ds.evaluation.sets import run_and_tell, skipped_images


def knn(config: KnnConfig) -> None:
    """Lets the nearest training images vote for the class of each test image, and reports how often they are right."""
    run_and_tell(config, knn_sets, describe)


def describe(result: Result, name: str, kept_or_seconds: str) -> list[str]:
    """What is said of one set."""
    details = result.details
    shown = {key: value for key, value in result.metrics.items() if key.endswith(("_acc1", "_precision"))}
    parts = [
        f"{result.pretrained}: " + ", ".join(f"{key} {value:.4f}" for key, value in shown.items()),
        f"{details['n_test']} test images of {name}, {details['n_train']} neighbours x {details['feature_dim']} features",
        kept_or_seconds,
    ]
    if details["k_above_n"]:
        parts.append(f"k of {details['k_above_n']} is more than all training images: these {details['n_train']} vote")
    return parts + skipped_images(details)


if __name__ == "__main__":
    cli.run(fire.Fire, knn, KnnConfig)
