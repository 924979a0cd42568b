"""Linear probe of frozen features by CLIP's protocol, on one set or on all 27.

python tools/linear_probe.py --model run:run/ --train_shards 'train/*.tar' --test_shards 'test/*.tar' --output probe.json
deepspeed --hostfile hosts tools/linear_probe.py --model run:run/ --root sets/ --datasets all --cache features/ \\
    --output_dir results/
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ProbeConfig
from mlcd_ds.evaluation.probe import probe_sets
from mlcd_ds.evaluation.results import Result
from mlcd_ds.evaluation.sets import run_and_tell, skipped_images


def linear_probe(config: ProbeConfig) -> None:
    """Fits logistic regressions on frozen features and reports what they know of the true classes of the test images."""
    run_and_tell(config, probe_sets, describe)


def describe(result: Result, name: str, kept_or_seconds: str) -> list[str]:
    """What is said of one set."""
    details = result.details
    parts = [
        f"{result.pretrained}: {result.main_metric.removeprefix('lp_')} {result.score:.4f} on {details['n_test']} test "
        f"images of {name}",
        f"lambda {details['lambda']:.3g}",
        f"{details['n_train']} train images x {details['feature_dim']} features",
        kept_or_seconds,
    ]
    if missing := details["classes_without_test_image"]:
        parts.append(f"classes without a test image, left out of means over classes: {missing}")
    if missing := details["classes_without_train_image"]:
        parts.append(f"classes without a training image, scored as chance: {missing}")
    parts += skipped_images(details)
    if details["not_converged"]:
        parts.append(
            f"{details['not_converged']} fits stopped at --max_iterations {details['settings']['max_iterations']}"
        )
    if "classes_in_clips_table" in details:
        parts.append(f"{details['num_classes']} classes, {details['classes_in_clips_table']} in CLIP's table")
    return parts


if __name__ == "__main__":
    cli.run(fire.Fire, linear_probe, ProbeConfig)
