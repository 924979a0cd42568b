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
from mlcd_ds.evaluation.sets import raise_failed, summary
from mlcd_ds.files import make_folder
from mlcd_ds.topology import Topology


def knn(config: KnnConfig) -> None:
    """Lets the nearest training images vote for the class of each test image, and reports how often they are right."""
    topology = Topology.from_environment()
    if topology.is_distributed:
        topology.start(config.timeout_minutes)
    if config.output is not None:
        make_folder(Path(config.output).parent)
    evaluated = knn_sets(config, topology)
    if topology.is_main:
        for name, result in evaluated.results.items():
            details = result.details
            shown = {key: value for key, value in result.metrics.items() if key.endswith(("_acc1", "_precision"))}
            parts = [
                f"{result.pretrained}: " + ", ".join(f"{key} {value:.4f}" for key, value in shown.items()),
                f"{details['n_test']} test images of {name}, {details['n_train']} neighbours x {details['feature_dim']} "
                "features",
                "newer than its inputs: kept" if name in evaluated.kept else f"{details['seconds']:.1f} s",
            ]
            if details["k_above_n"]:
                parts.append(
                    f"k of {details['k_above_n']} is more than all training images: these {details['n_train']} vote"
                )
            if skipped := {split: counts for split, counts in details["skipped"].items() if counts}:
                parts.append(f"skipped {skipped}")
            print("; ".join(parts))
        if config.root is not None:
            print(summary(evaluated))
    topology.stop()
    raise_failed(evaluated)


if __name__ == "__main__":
    cli.run(fire.Fire, knn, KnnConfig)
