"""Zero-shot classification by class names, of sets in CLIP_benchmark's layout.

python tools/zero_shot.py --model run:lit/ --root sets/ --datasets imagenet1k,imagenet-a --output_dir results/
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ZeroShotConfig
from mlcd_ds.evaluation.text_sets import evaluate_text_sets
from mlcd_ds.evaluation.zero_shot import TASK, files_of_sets, zero_shot_set


def zero_shot(config: ZeroShotConfig) -> None:
    """Tells classes by the texts that name them: accuracy, recall per class; mean average precision of several classes."""
    evaluate_text_sets(config, TASK, zero_shot_set, files_of_sets(config))


if __name__ == "__main__":
    cli.run(fire.Fire, zero_shot, ZeroShotConfig)
