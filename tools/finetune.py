"""Fine-tunes an encoder on images of one class each; top-1 and top-5 on the test images after each epoch.

deepspeed [--hostfile hosts] tools/finetune.py --deepspeed_config ds_configs/cpu.json --init_from run/ \\
    --shards 'imagenet1k/train/*.tar' --test_shards 'imagenet1k/test/*.tar' --output_dir finetuned/ --epochs 30
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import FinetuneConfig
from mlcd_ds.finetune import finetune

if __name__ == "__main__":
    cli.run(fire.Fire, finetune, FinetuneConfig)
