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
from mlcd_ds.evaluation.sets import raise_failed, summary
from mlcd_ds.files import make_folder
from mlcd_ds.topology import Topology


def linear_probe(config: ProbeConfig) -> None:
    """Fits logistic regressions on frozen features and reports what they know of the true classes of the test images."""
    topology = Topology.from_environment()
    if topology.is_distributed:
        topology.start(config.timeout_minutes)
    if config.output is not None:
        make_folder(Path(config.output).parent)
    evaluated = probe_sets(config, topology)
    if topology.is_main:
        for name, result in evaluated.results.items():
            details = result.details
            parts = [
                f"{result.pretrained}: {result.main_metric.removeprefix('lp_')} {result.score:.4f} on "
                f"{details['n_test']} test "
                f"images of {name}",
                f"lambda {details['lambda']:.3g}",
                f"{details['n_train']} train images x {details['feature_dim']} features",
                "newer than its inputs: kept" if name in evaluated.kept else f"{details['seconds']:.1f} s",
            ]
            if missing := details["classes_without_test_image"]:
                parts.append(f"classes without a test image, left out of means over classes: {missing}")
            if missing := details["classes_without_train_image"]:
                parts.append(f"classes without a training image, scored as chance: {missing}")
            if skipped := {split: counts for split, counts in details["skipped"].items() if counts}:
                parts.append(f"skipped {skipped}")
            if details["not_converged"]:
                parts.append(f"{details['not_converged']} fits stopped at --max_iterations {config.max_iterations}")
            if "classes_in_clips_table" in details:
                parts.append(f"{details['num_classes']} classes, {details['classes_in_clips_table']} in CLIP's table")
            print("; ".join(parts))
        if config.root is not None:
            print(summary(evaluated))
    topology.stop()
    raise_failed(evaluated)


if __name__ == "__main__":
    cli.run(fire.Fire, linear_probe, ProbeConfig)
