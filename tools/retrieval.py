"""Image-text retrieval, of sets with captions in CLIP_benchmark's or img2dataset's layout.

python tools/retrieval.py --model run:lit/ --root sets/ --datasets mscoco_captions,flickr30k --output_dir results/
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import RetrievalConfig
from mlcd_ds.evaluation.retrieval import TASK, retrieval_set
from mlcd_ds.evaluation.text_sets import evaluate_text_sets


def retrieval(config: RetrievalConfig) -> None:
    """Looks for images by their captions and for captions by their images: recall at 1, 5, 10."""
    evaluate_text_sets(config, TASK, retrieval_set)


if __name__ == "__main__":
    cli.run(fire.Fire, retrieval, RetrievalConfig)
