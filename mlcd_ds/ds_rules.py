"""One function for each trap in a DeepSpeed JSON: it puts the right value into the dict, says so in `notes`, or raises
a ConfigError with the cure. `ds_config.resolve_deepspeed_config` calls them in order, on a copy whose keys are checked.
"""

import importlib.util
import json
from pathlib import Path
from typing import Literal

import torch

from mlcd_ds.config import DeepSpeedDefaults
from mlcd_ds.ds_keys import AUTO, SCHEDULERS, UNSUPPORTED_KEYS, is_kind
from mlcd_ds.errors import ConfigError

_DTYPE_NAMES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


def with_whole_numbers(block: dict, known: dict) -> dict:
    """5e8 is a float in JSON; where DeepSpeed counts, make it an int."""
    for key, value in block.items():
        kind = known.get(key)
        if isinstance(value, dict) and isinstance(kind, dict):
            with_whole_numbers(value, kind)
        elif kind == "int" and value != AUTO:
            block[key] = int(value)
    return block


def drop_switched_off(config: dict) -> None:
    """Removes unsupported keys that say they are off: DeepSpeed then sees nothing of them."""
    for path in UNSUPPORTED_KEYS:
        *parents, key = path.split(".")
        block = config
        for parent in parents:
            block = block.get(parent, {})
        block.pop(key, None)


def resolve_precision(config: dict, device_type: str, notes: list[str]) -> Literal["float32", "bfloat16"]:
    if "bfloat16" in config:
        if "bf16" in config:
            raise ConfigError('"bf16" and "bfloat16" are two names of one block: keep "bf16"')
        config["bf16"] = config.pop("bfloat16")
    fp16 = config.pop("fp16", {}).get("enabled", False)
    if fp16 is True:
        raise ConfigError(
            '"fp16.enabled" is true: float16 needs a loss scale, which the class head outside the engine does not have. '
            'Write "bf16": {"enabled": true} instead; the range of bfloat16 needs no scale'
        )
    if fp16 == AUTO:
        notes.append('fp16.enabled "auto": off, the half precision here is bfloat16')
    bf16 = config.get("bf16")
    if bf16 is None or bf16.get("enabled", False) is False:
        config.pop("bf16", None)
        if device_type == "cuda":
            notes.append('precision float32: the JSON has no "bf16": {"enabled": true}')
        return "float32"
    if bf16["enabled"] == AUTO:
        bf16["enabled"] = device_type == "cuda"
        notes.append(f'bf16.enabled "auto": {"on" if bf16["enabled"] else "off"} for the device {device_type}')
        if not bf16["enabled"]:
            del config["bf16"]
            return "float32"
    if device_type == "cpu":
        notes.append("bfloat16 on a CPU without AMX is about a hundred times slower than float32")
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise ConfigError(
            f'"bf16.enabled" is true, but {torch.cuda.get_device_name()} has no bfloat16 arithmetic (it came with compute '
            'capability 8.0). Remove the "bf16" block to train in float32'
        )
    return "bfloat16"


def resolve_zero(config: dict, device_type: str, defaults: DeepSpeedDefaults, notes: list[str]) -> int:
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f'"zero_optimization.stage" is {stage}: it must be 0, 1, 2 or 3')
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            '"zero_optimization.compute_grad_norm" is false: clipping and the log need the norm. Remove it'
        )
    for key, value in (
        ("reduce_bucket_size", defaults.reduce_bucket_size),
        ("stage3_prefetch_bucket_size", defaults.prefetch_bucket_size),
        ("stage3_param_persistence_threshold", defaults.param_persistence_threshold),
    ):
        if zero.get(key) == AUTO:
            zero[key] = value
            notes.append(f'zero_optimization.{key} "auto": {value:,} elements')
    for key in ("offload_param", "offload_optimizer"):
        if zero.get(key, {}).get("device", "none") == "none":
            zero.pop(key, None)
        elif device_type == "cpu":
            del zero[key]
            notes.append(f"zero_optimization.{key} dropped: on a CPU everything is in host memory already")
    if "offload_param" in zero and stage != 3:
        raise ConfigError(f'"zero_optimization.offload_param" needs stage 3, the stage is {stage}')
    if "offload_optimizer" in zero and stage == 0:
        raise ConfigError('"zero_optimization.offload_optimizer" needs stage 1, 2 or 3, the stage is 0')
    return stage


def resolve_data_types(config: dict, precision: str, zero_stage: int, notes: list[str]) -> None:
    types = config.setdefault("data_types", {})
    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        if key in types:
            types[key] = _DTYPE_NAMES.get(types[key].removeprefix("torch."), types[key])
    accumulate = types.get("grad_accum_dtype")
    allowed = ("fp32",) if precision == "float32" else ("fp32", "bf16")
    if accumulate is not None and accumulate not in allowed:
        raise ConfigError(
            f'"data_types.grad_accum_dtype" is {accumulate!r}: in {precision} it may be {" or ".join(map(repr, allowed))}'
        )
    if types.get("param_dtype", "bf16" if precision == "bfloat16" else "fp32") not in allowed[-1:]:
        raise ConfigError(
            f'"data_types.param_dtype" is {types["param_dtype"]!r}, but the run is in {precision}. Remove it'
        )
    if types.get("keep_in_fp32_modules") == AUTO:
        del types["keep_in_fp32_modules"]  # "auto" is DeepSpeed's default, and nothing else may say "auto" to it
    communicate = config.get("communication_data_type", "fp32")
    if communicate not in ("fp32", "bf16"):
        raise ConfigError(
            f'"communication_data_type" is {communicate!r}: it may be "fp32" or "bf16" (float16 would overflow)'
        )
    if precision == "bfloat16" and zero_stage == 0:
        if accumulate == "fp32":
            raise ConfigError(
                '"data_types.grad_accum_dtype" is "fp32" with bf16 at "zero_optimization.stage" 0, which DeepSpeed refuses: '
                'set the stage to 1 (it accumulates in float32), or "grad_accum_dtype" to "bf16"'
            )
        types["grad_accum_dtype"] = "bf16"
        notes.append("gradients accumulate in bfloat16, all that ZeRO 0 offers; stage 1 and above use float32")
    elif precision == "bfloat16" and accumulate is None:
        types["grad_accum_dtype"] = "fp32"
        notes.append("gradients accumulate in float32, so that the result hardly depends on the accumulation steps")
    if not types:
        del config["data_types"]


def refuse_other_averages(config: dict) -> None:
    """The factor world_size in the head's gradient (`gather_rows`) is right for a plain mean over ranks alone."""
    for key, only in (
        ("gradient_allreduce_op", "mean"),
        ("prescale_gradients", False),
        ("gradient_predivide_factor", 1),
        ("managed_gradient_accumulation", True),
    ):
        if config.pop(key, only) != only:
            raise ConfigError(
                f'"{key}" must be {json.dumps(only)}: the gradient through the head counts on it. Remove it'
            )


def resolve_clipping(config: dict, defaults: DeepSpeedDefaults, notes: list[str]) -> float:
    clipping = config.get("gradient_clipping", AUTO)
    if clipping == AUTO:
        clipping = defaults.gradient_clipping
        notes.append(
            f"gradient_clipping {clipping} (also DeepSpeed's own value when the key is absent); 0 turns it off"
        )
    if clipping < 0:
        raise ConfigError(f'"gradient_clipping" is {clipping}: it must be 0 (off) or a norm above 0')
    config["gradient_clipping"] = float(clipping)
    return float(clipping)


def resolve_optimizer(config: dict, device_type: str, defaults: DeepSpeedDefaults, notes: list[str]) -> dict:
    """Returns the optimizer's params."""
    block = config.get("optimizer", {})
    if "type" not in block:
        raise ConfigError(
            "the DeepSpeed JSON has no optimizer: add "
            '"optimizer": {"type": "AdamW", "params": {"lr": 4e-4, "weight_decay": 0.2}}'
        )
    if block["type"].lower() not in ("adam", "adamw"):
        raise ConfigError(
            f'"optimizer.type" is {block["type"]!r}: it must be "AdamW", which the centers of the head are trained with too '
            "(1-bit optimizers are gone from DeepSpeed; Lamb, Lion and Muon have no counterpart for the centers)"
        )
    params = block.setdefault("params", {})
    for key, example in (("lr", "4e-4 for ViT-L, 5e-4 for ViT-B"), ("weight_decay", "0.2")):
        # Left to the implementations, weight decay would be 0 with DeepSpeed's FusedAdam and 0.01 with torch's AdamW.
        if key not in params:
            raise ConfigError(f'"optimizer.params.{key}" is missing: write it (the paper, at batch 32,800: {example})')
    for key, default in (("betas", list(defaults.betas)), ("eps", defaults.eps)):
        if params.get(key, AUTO) == AUTO:
            params[key] = default
            notes.append(f"optimizer.params.{key} {default} (Adam's usual)")
    _check_ranges(params)
    if params.pop("adam_w_mode", True) is False:
        raise ConfigError('"adam_w_mode" is false: weight decay must be decoupled, as it is for the centers. Remove it')
    if block["type"].lower() == "adam":
        notes.append('optimizer "Adam" is AdamW to DeepSpeed as well')
    block["type"] = "AdamW"
    _choose_adam(params, device_type, notes)
    return params


def _check_ranges(params: dict) -> None:
    betas = params["betas"]
    if len(betas) != 2 or not all(is_kind(beta, "number") and 0 <= beta < 1 for beta in betas):
        raise ConfigError(f'"optimizer.params.betas" is {betas}: it must be two numbers in [0, 1), like [0.9, 0.98]')
    for key, good in (
        ("lr", params["lr"] > 0),
        ("eps", params["eps"] > 0),
        ("weight_decay", params["weight_decay"] >= 0),
    ):
        if not good:
            bound = "at least 0" if key == "weight_decay" else "above 0"
            raise ConfigError(f'"optimizer.params.{key}" is {params[key]}: it must be {bound}')


def _choose_adam(params: dict, device_type: str, notes: list[str]) -> None:
    """DeepSpeed's FusedAdam needs CUDA (on CPUs, a compiler); torch's AdamW runs anywhere."""
    wanted = params.get("torch_adam", AUTO)
    if wanted == AUTO or (device_type == "cpu" and not wanted):
        if device_type == "cpu":
            notes.append(
                "optimizer.params.torch_adam set: DeepSpeed's fused Adam would have to be compiled for the CPU"
            )
        params["torch_adam"] = device_type == "cpu"
    only_fused, only_torch = {"bias_correction", "fp32_optimizer_states"}, {"foreach", "fused"}
    misplaced = (only_fused if params["torch_adam"] else only_torch) & set(params)
    if "bias_correction" in misplaced and params["bias_correction"]:
        del params["bias_correction"]  # on is what torch's AdamW does
        misplaced.discard("bias_correction")
    if misplaced:
        raise ConfigError(
            f'"optimizer.params.{min(misplaced)}" does not go with "torch_adam": {json.dumps(params["torch_adam"])}. '
            "Remove one of them"
        )


def resolve_scheduler(
    config: dict, lr: float, total_steps: int, warmup_steps: int, defaults: DeepSpeedDefaults, notes: list[str]
) -> None:
    scheduler = config.get("scheduler")
    if scheduler is None:
        notes.append('no "scheduler": the learning rate is constant and there is no warm-up')
        return
    params = with_whole_numbers(scheduler.setdefault("params", {}), SCHEDULERS[scheduler["type"]])
    known = SCHEDULERS[scheduler["type"]]
    if "warmup_type" not in params:
        params["warmup_type"] = defaults.warmup_type
        notes.append(f"scheduler.params.warmup_type {defaults.warmup_type} (absent, it would be DeepSpeed's log)")
    if params["warmup_type"] not in ("linear", "log"):
        raise ConfigError(f'"scheduler.params.warmup_type" is {params["warmup_type"]!r}: it must be "linear" or "log"')
    if "total_num_steps" in known:
        _resolve_total(params, total_steps, notes)
    _resolve_warmup(params, total_steps, warmup_steps, notes)
    if "warmup_max_lr" in known:
        _resolve_peak(params, lr, notes)
    if params["warmup_num_steps"] == 0:
        # DeepSpeed refuses 0. With 1 it takes 2, which a start at the full rate makes harmless.
        params["warmup_num_steps"] = 1
        params.update({"warmup_min_ratio": 1.0} if "warmup_min_ratio" in known else {"warmup_min_lr": lr})
        notes.append("no warm-up: the full learning rate at once (with WarmupCosineLR from the second step on)")
    elif params.get("warmup_min_lr") == AUTO:
        params["warmup_min_lr"] = 0.0


def _resolve_total(params: dict, total_steps: int, notes: list[str]) -> None:
    total = params.get("total_num_steps", AUTO)
    if total == AUTO:
        params["total_num_steps"] = total_steps
        notes.append(f"scheduler.params.total_num_steps {total_steps}: the length of the run")
    elif total < total_steps:
        raise ConfigError(
            f'"scheduler.params.total_num_steps" is {total}, but the run has {total_steps} steps: the rest would run at the '
            'lowest learning rate. Write "auto"'
        )
    elif total > total_steps:
        notes.append(f"the schedule is made for {total} steps, the run stops after {total_steps}")


def _resolve_warmup(params: dict, total_steps: int, warmup_steps: int, notes: list[str]) -> None:
    warmup = params.get("warmup_num_steps", AUTO)
    if warmup == AUTO:
        params["warmup_num_steps"] = warmup_steps
        notes.append(f"scheduler.params.warmup_num_steps {warmup_steps}: the warm-up of the run")
    elif warmup < 0 or warmup >= params.get("total_num_steps", total_steps):
        raise ConfigError(
            f'"scheduler.params.warmup_num_steps" is {warmup}, but the run has {total_steps} steps. '
            'Write "auto": it follows --warmup_steps, and is at most a tenth of the run'
        )
    elif warmup != warmup_steps:
        notes.append(
            f"warm-up of {warmup} steps, from the JSON; --warmup_steps ({warmup_steps} here) counts where it says auto"
        )


def _resolve_peak(params: dict, lr: float, notes: list[str]) -> None:
    peak = params.get("warmup_max_lr", AUTO)
    if peak == AUTO:
        params["warmup_max_lr"] = lr
        notes.append(
            f"scheduler.params.warmup_max_lr {lr}: the optimizer's lr (absent, WarmupDecayLR would take 0.001)"
        )
    elif peak != lr:
        raise ConfigError(
            f'"scheduler.params.warmup_max_lr" is {peak} and "optimizer.params.lr" is {lr}: DeepSpeed would take the first. '
            'Leave "warmup_max_lr" out'
        )


def resolve_activation_checkpointing(config: dict, device_type: str, notes: list[str]) -> None:
    block = config.get("activation_checkpointing")
    if block is None:
        return
    # Both split or pack activations over the ranks of a model-parallel group. Without one, partitioning copies every
    # activation and saves nothing, and the contiguous buffers need the partitioned ones.
    for key in ("partition_activations", "contiguous_memory_optimization"):
        if block.get(key):
            block[key] = False
            notes.append(f"activation_checkpointing.{key} off: there is no model parallelism to split activations over")
    if block.get("cpu_checkpointing") and device_type == "cpu":
        # DeepSpeed would take the inputs for copies of themselves, empty them, and fail in the backward pass.
        block["cpu_checkpointing"] = False
        notes.append("activation_checkpointing.cpu_checkpointing off: activations are in host memory as it is")
    if block.get("number_checkpoints"):
        notes.append(
            "activation_checkpointing.number_checkpoints only sizes contiguous buffers, which are off; --checkpoint_layers "
            "says how many blocks are computed again"
        )
    notes.append("activation checkpointing on: each block's activations are computed again in the backward pass")


def resolve_monitors(config: dict, output_dir: str, defaults: DeepSpeedDefaults, notes: list[str]) -> None:
    for key, folder in (("tensorboard", defaults.tensorboard_folder), ("csv_monitor", defaults.csv_folder)):
        block = config.get(key, {})
        if not block.get("enabled", False):
            continue
        if not block.get("output_path"):
            block["output_path"] = str(
                output_dir
            )  # DeepSpeed would write below the folder that the run is started from
        block.setdefault("job_name", folder)
        notes.append(f"{key}: {Path(block['output_path']) / block['job_name']}")
    for key, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")):
        if config.get(key, {}).get("enabled", False) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'"{key}.enabled" is true, but {package} is not installed: pip install {package}, or turn it off'
            )


def resolve_rest(config: dict, defaults: DeepSpeedDefaults, notes: list[str]) -> None:
    if config.get("steps_per_print", 1) < 1:
        raise ConfigError(f'"steps_per_print" is {config["steps_per_print"]}: leave it out for silence')
    if "steps_per_print" not in config and "timers" not in config:
        # The timer's only output is the line of steps_per_print, yet it waits for the GPU twice in every forward pass.
        config["timers"] = {"throughput": {"enabled": False}}
        notes.append("DeepSpeed's throughput timer off: it stalls the GPU, and the trainer measures its own")
    checkpoint = config.setdefault("checkpoint", {})
    checkpoint.setdefault("tag_validation", defaults.tag_validation)
    if checkpoint["tag_validation"].lower() not in ("warn", "ignore", "fail"):
        raise ConfigError(
            f'"checkpoint.tag_validation" is {checkpoint["tag_validation"]!r}: it must be Warn, Ignore or Fail'
        )
