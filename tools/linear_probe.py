"""Linear probe: multi-label mean average precision of frozen features.

python tools/linear_probe.py --model run:run/ --train_shards 'train/*.tar' --test_shards 'test/*.tar' --output probe.json
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ProbeConfig
from mlcd_ds.evaluation.probe import finished_result, probe
from mlcd_ds.files import make_folder
from mlcd_ds.topology import Topology


def linear_probe(config: ProbeConfig) -> None:
    """Fits logistic regressions on frozen features and reports mean average precision on the test images."""
    topology = Topology.from_environment()
    if not topology.is_main:  # one process does it
        return
    if config.output is not None:
        make_folder(Path(config.output).parent)
    result = finished_result(config)
    kept = result is not None
    result = result or probe(config, topology.device)
    parts = [
        f"{result['model']}: mAP {result['mAP']:.4f} on {result['n_test']} test images",
        f"lambda {result['lambda']:.3g}",
        f"{result['n_train']} train images x {result['feature_dim']} features",
        f"{config.output} is newer than its inputs: kept" if kept else f"{result['seconds']:.1f} s",
    ]
    if missing := result["classes_without_test_image"]:
        parts.append(f"classes without a test image, left out of the mean: {missing}")
    if missing := result["classes_without_train_image"]:
        parts.append(f"classes without a training image, scored as chance: {missing}")
    if skipped := {split: counts for split, counts in result["skipped"].items() if counts}:
        parts.append(f"skipped {skipped}")
    if result["not_converged"]:
        parts.append(f"{result['not_converged']} classes stopped at --max_iterations {config.max_iterations}")
    print("; ".join(parts))


if __name__ == "__main__":
    cli.run(fire.Fire, linear_probe, ProbeConfig)
