"""What a run will take on machines that are not here: memory, bytes, FLOPs, images a second, days; and the fastest JSON.

python tools/plan.py --model vit_l14 --num_classes 1000000 --gpus 80 --tflops 790 \\
    --deepspeed_config ds_configs/vit_l14_80gpu.json
python tools/plan.py --model vit_h14 --gpus 64 --deepspeed_config ds_configs/vit_h14_zero3.json --tflops 790 --suggest
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli, step_plan
from mlcd_ds.config import PlanConfig
from mlcd_ds.ds_config import load_deepspeed_config


def main(config: PlanConfig) -> None:
    """Plans a training run from its DeepSpeed JSON. Starts nothing."""
    raw = load_deepspeed_config(config.deepspeed_config)
    source = "given"
    if config.tflops is None:
        rate, source = step_plan.measured_tflops(config.device)
        config = config.model_copy(update={"tflops": rate})
    if config.suggest:
        print(step_plan.suggestion(*step_plan.suggest(config, raw)))
        return
    plan = step_plan.plan_step(config, raw)
    print(step_plan.card(plan, source, raw))
    if config.fake:
        print()
        print(step_plan.compare_pretended(plan))


if __name__ == "__main__":
    cli.run(fire.Fire, main, PlanConfig)
