"""The keys of a DeepSpeed JSON: which exist, of what kind, which may be "auto", and which are refused with what cure.

DeepSpeed ignores unknown keys at the top and in several blocks, and turns "auto" into its own defaults; the tables here
let `ds_config.py` say so before any process group forms. A test holds them to the installed DeepSpeed.

Kinds: "bool", "int" (also 5e8), "number", "str", "list", "any"; a dict is a block with these keys.
"""

import difflib
import math
from collections.abc import Iterator
from typing import Any

from mlcd_ds.errors import ConfigError

AUTO = "auto"

TOP_LEVEL_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

_OFFLOAD = {
    "device": "str",
    "nvme_path": "str",
    "buffer_count": "int",
    "pin_memory": "bool",
}

_ZERO = {
    "stage": "int",
    "contiguous_gradients": "bool",
    "reduce_scatter": "bool",
    "reduce_bucket_size": "int",
    "use_multi_rank_bucket_allreduce": "bool",
    "allgather_partitions": "bool",
    "allgather_bucket_size": "int",
    "overlap_comm": "bool",
    "compute_grad_norm": "bool",
    "load_from_fp32_weights": "bool",
    "offload_param": {**_OFFLOAD, "buffer_size": "int", "max_in_cpu": "int"},
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": "bool",
        "pipeline_write": "bool",
        "fast_init": "bool",
        "ratio": "number",
    },
    "sub_group_size": "int",
    "stage3_prefetch_bucket_size": "int",
    "stage3_param_persistence_threshold": "int",
    "stage3_model_persistence_threshold": "int",
    "stage3_max_live_parameters": "int",
    "stage3_max_reuse_distance": "int",
    "stage3_gather_16bit_weights_on_model_save": "bool",
    "stage3_module_granularity_threshold": "int",
    "stage3_use_all_reduce_for_fetch_params": "bool",
    "stage3_allgather_sequential": "bool",
    "ignore_unused_parameters": "bool",
    "round_robin_gradients": "bool",
    "parameter_alignment": "bool",
    "zero_hpz_partition_size": "int",
    "zero_quantized_weights": "bool",
    "zero_quantized_nontrainable_weights": "bool",
    "zero_quantized_gradients": "bool",
    "memory_efficient_linear": "bool",
    "pipeline_loading_checkpoint": "bool",
    "override_module_apply": "bool",
    "log_trace_cache_warnings": "bool",
    "enable_sanity_checks": "bool",
    "leaf_module": "any",
}

_LOG_FILES = {"enabled": "bool", "output_path": "str", "job_name": "str"}

KNOWN_KEYS = {
    **dict.fromkeys(TOP_LEVEL_BATCH_KEYS, "int"),
    "managed_gradient_accumulation": "bool",
    "steps_per_print": "int",
    "dump_state": "bool",
    "disable_python_gc": "bool",
    "log_level": "str",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "communication_data_type": "str",
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "number",
    "gradient_allreduce_op": "str",
    "gradient_clipping": "number",
    "zero_allow_untested_optimizer": "bool",
    "zero_force_ds_cpu_optimizer": "bool",
    "optimizer": {
        "type": "str",
        "params": {
            "lr": "number",
            "betas": "list",
            "eps": "number",
            "weight_decay": "number",
            "torch_adam": "bool",
            "adam_w_mode": "bool",
            "bias_correction": "bool",
            "foreach": "bool",
            "fused": "bool",
            "fp32_optimizer_states": "bool",
        },
    },
    "scheduler": {"type": "str", "params": "any"},  # its keys depend on the type: SCHEDULERS
    "bf16": {
        "enabled": "bool",
        "check_grad_overflow": "bool",
        "immediate_grad_update": "bool",
    },
    "fp16": {
        "enabled": "bool",
        "auto_cast": "bool",
        "loss_scale": "number",
        "initial_scale_power": "int",
        "loss_scale_window": "int",
        "hysteresis": "int",
        "consecutive_hysteresis": "bool",
        "min_loss_scale": "number",
        "fp16_master_weights_and_grads": "bool",
    },
    "data_types": {
        "grad_accum_dtype": "str",
        "param_dtype": "str",
        "buffer_dtype": "str",
        "keep_in_fp32_modules": "any",
    },
    "zero_optimization": _ZERO,
    "activation_checkpointing": {
        "partition_activations": "bool",
        "cpu_checkpointing": "bool",
        "contiguous_memory_optimization": "bool",
        "number_checkpoints": "int",
        "synchronize_checkpoint_boundary": "bool",
        "profile": "bool",
    },
    "tensorboard": _LOG_FILES,
    "csv_monitor": _LOG_FILES,
    "wandb": {"enabled": "bool", "group": "str", "team": "str", "project": "str"},
    "comet": {
        "enabled": "bool",
        "samples_log_interval": "int",
        "project": "str",
        "workspace": "str",
        "api_key": "str",
        "experiment_name": "str",
        "experiment_key": "str",
        "online": "bool",
        "mode": "str",
    },
    "checkpoint": {
        "tag_validation": "str",
        "checkpoint_serialization": "bool",
        "parallel_write": {"pipeline_stage": "bool"},
    },
    "flops_profiler": {
        "enabled": "bool",
        "recompute_fwd_factor": "number",
        "profile_step": "int",
        "module_depth": "int",
        "top_modules": "int",
        "detailed": "bool",
        "output_file": "str",
    },
    "comms_logger": {"enabled": "bool", "prof_all": "bool", "prof_ops": "list", "verbose": "bool", "debug": "bool"},
    "timers": {"throughput": {"enabled": "bool", "synchronized": "bool"}},
    "aio": {
        "block_size": "int",
        "queue_depth": "int",
        "intra_op_parallelism": "int",
        "single_submit": "bool",
        "overlap_events": "bool",
        "use_gds": "bool",
    },
}

_WARMUP = {"warmup_num_steps": "int", "warmup_type": "str"}
SCHEDULERS = {
    "WarmupLR": {**_WARMUP, "warmup_min_lr": "number", "warmup_max_lr": "number"},
    "WarmupDecayLR": {**_WARMUP, "warmup_min_lr": "number", "warmup_max_lr": "number", "total_num_steps": "int"},
    "WarmupCosineLR": {**_WARMUP, "warmup_min_ratio": "number", "cos_min_ratio": "number", "total_num_steps": "int"},
}
"""The schedules the trainer drives, each with its parameters."""

AUTO_KEYS = frozenset(
    {
        *TOP_LEVEL_BATCH_KEYS,
        "gradient_clipping",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.torch_adam",
        "scheduler.params.warmup_num_steps",
        "scheduler.params.total_num_steps",
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_max_lr",
        "bf16.enabled",
        "fp16.enabled",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "data_types.keep_in_fp32_modules",
    }
)
"""Where "auto" has a meaning here; `resolve_deepspeed_config` says which."""

REMOVED_KEYS = {
    "amp": 'Apex AMP is gone from DeepSpeed. Remove the block; for mixed precision write "bf16": {"enabled": true}.',
    "elasticity": "elastic training is gone from DeepSpeed. Remove the block; train_batch_size and "
    "train_micro_batch_size_per_gpu are enough, accumulation follows the number of ranks.",
    "nebula": "Nebula checkpoints are gone from DeepSpeed. Remove the block; --save_every_steps saves here.",
    "compression_training": "the compression library is gone from DeepSpeed. Remove the block.",
    "quantize_training": "quantised training is gone from DeepSpeed. Remove the key.",
    "sparse_gradients": "the flag is gone from DeepSpeed, and the encoder has no sparse gradients. Remove the key.",
    "sparse_attention": "sparse attention is gone from DeepSpeed. Remove the block.",
    "eigenvalue": "eigenvalue-based quantisation is gone from DeepSpeed. Remove the block.",
    "curriculum_learning": "the block is gone from DeepSpeed, and the order of the samples is the loader's. Remove it.",
    "progressive_layer_drop": "progressive layer drop is gone from DeepSpeed. Remove the block.",
    "graph_harvesting": "graph harvesting is gone from DeepSpeed. Remove the key.",
    "zero_optimization.mics_shard_size": 'MiCS is gone from DeepSpeed. Remove the key; see "zero_hpz_partition_size".',
    "zero_optimization.mics_hierarchical_params_gather": "MiCS is gone from DeepSpeed. Remove the key.",
    "zero_optimization.zeropp_loco_param": "LoCo is gone from DeepSpeed. Remove the key.",
}
"""Refused by DeepSpeed even when disabled."""

_ONE_PARALLELISM = "the encoder is data parallel only (ZeRO), and the head is split by class. Remove it."
_NO_EFFECT = "it has no effect in this trainer. Remove it."

UNSUPPORTED_KEYS = {
    "pipeline": _ONE_PARALLELISM,
    "tensor_parallel": _ONE_PARALLELISM,
    "sequence_parallel_size": _ONE_PARALLELISM,
    "seq_parallel_communication_data_type": _ONE_PARALLELISM,
    "expert_parallel": _ONE_PARALLELISM,
    "use_data_before_expert_parallelism": _ONE_PARALLELISM,
    "moe": _ONE_PARALLELISM,
    "hybrid_engine": "it is for reinforcement learning of language models. Remove it.",
    "data_efficiency": "the order of the samples is the loader's, so that a run can resume exactly. Remove it.",
    "autotuning": "autotuning restarts the script with other settings, which the run folder refuses. Remove it.",
    "weight_quantization": "it is for inference. Remove it.",
    "torch_autocast": 'the precision must be one that the head knows. Remove it and write "bf16": {"enabled": true}.',
    "compile": "DeepCompile is untried with a head outside the engine. Remove it.",
    "datastates_ckpt": "it writes checkpoints after save returns, too late for our checksums. Remove it.",
    "dataloader_drop_last": _NO_EFFECT,
    "vocabulary_size": _NO_EFFECT,
    "disable_allgather": _NO_EFFECT,
    "allgather_size": 'its name is "zero_optimization": {"allgather_bucket_size": ...}.',
    "optimizer.legacy_fusion": _NO_EFFECT,
    "optimizer.params.max_grad_norm": 'clipping is "gradient_clipping" at the top level.',
    "activation_checkpointing.enabled": "DeepSpeed has no such switch: the block alone turns activation "
    "checkpointing on here. Remove the key, or remove the block to turn it off.",
    "wandb.entity": 'its name is "team".',
    "bf16.bf16_master_weights_and_grads": "the master weights stay float32 here. Remove it.",
    "bf16.bf16_optimizer_states": "the optimizer state stays float32 here. Remove it.",
    "checkpoint.load_universal": "resuming decides this by itself. Remove it.",
    "checkpoint.use_node_local_storage": "a checkpoint is one folder that all ranks share. Remove it.",
    "checkpoint.writer": "it may write after save returns, too late for our checksums. Remove it.",
    "zero_optimization.zenflow": "ZenFlow updates weights at other steps than the head's. Remove it.",
    "zero_optimization.offload_optimizer.super_offload": "it is untried with a head outside the engine. Remove it.",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload. Remove it.",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer here is AdamW. Remove it.",
    "zero_optimization.legacy_stage1": "the old ZeRO 1 is gone from DeepSpeed. Remove it.",
    "zero_optimization.elastic_checkpoint": "it is out of use in DeepSpeed. Remove it.",
    "zero_optimization.cpu_offload": 'its successor is "offload_optimizer": {"device": "cpu"}.',
    "zero_optimization.cpu_offload_param": 'its successor is "offload_param": {"device": "cpu"}.',
    "zero_optimization.cpu_offload_use_pin_memory": 'its successor is "pin_memory" in the offload blocks.',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "its successor is "
    '"stage3_gather_16bit_weights_on_model_save"; exporting here needs neither.',
}
"""Keys that DeepSpeed takes but this trainer does not; accepted (and dropped) where they say false."""

_KIND_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "number": "a number",
    "str": "a string",
    "list": "a list",
}


def check_keys(raw: dict) -> None:
    """Raises ConfigError for a key that is removed, unsupported, unknown or of the wrong kind, with the cure."""
    _check_block(raw, KNOWN_KEYS, "")
    scheduler = raw.get("scheduler")
    if scheduler is None:
        return
    name = scheduler.get("type")
    if name not in SCHEDULERS:
        raise ConfigError(f'"scheduler.type" is {name!r}: it must be one of {", ".join(SCHEDULERS)}')
    params = scheduler.get("params", {})
    if not isinstance(params, dict):
        raise ConfigError(f'"scheduler.params" must be a block {{...}}, not {params!r}')
    _check_block(params, SCHEDULERS[name], "scheduler.params.")


def _check_block(block: dict, known: dict, prefix: str) -> None:
    for key, value in block.items():
        path = prefix + key
        if path in REMOVED_KEYS:
            raise ConfigError(f'"{path}" is not supported: {REMOVED_KEYS[path]}')
        if path in UNSUPPORTED_KEYS:
            if _is_off(value):
                continue
            raise ConfigError(f'"{path}" is not supported: {UNSUPPORTED_KEYS[path]}')
        if path == "bfloat16":  # DeepSpeed's old name of the block
            _check_block({"bf16": value}, known, prefix)
        elif key not in known:
            raise ConfigError(_unknown_key(path, key, known, prefix))
        else:
            _check_value(path, value, known[key])


def _is_off(value: Any) -> bool:
    return value is False or (isinstance(value, dict) and value.get("enabled") is False)


def _unknown_key(path: str, key: str, known: dict, prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        hint = f'did you mean "{prefix}{near[0]}"?'
    elif homes := [f"{home}.{key}" for home, keys in _blocks(KNOWN_KEYS, "") if key in keys]:
        hint = f'it belongs to a block: "{homes[0]}"'
    elif key in KNOWN_KEYS:
        hint = "it belongs to the top level"
    else:
        hint = "DeepSpeed would ignore it. Remove it" if not prefix else f'"{prefix[:-1]}" takes {", ".join(known)}'
    return f'unknown key "{path}": {hint}'


def _blocks(known: dict, prefix: str) -> Iterator[tuple[str, dict]]:
    for key, kind in known.items():
        if isinstance(kind, dict):
            yield prefix + key, kind
            yield from _blocks(kind, f"{prefix}{key}.")


def _check_value(path: str, value: Any, kind: str | dict) -> None:
    if value is None:
        raise ConfigError(f'"{path}" is null: leave the key out for its default')
    if value == AUTO:
        if path not in AUTO_KEYS:
            raise ConfigError(f'"{path}" is "auto", which nothing resolves: write its value')
        return
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise ConfigError(f'"{path}" must be a block {{...}}, not {value!r}')
        _check_block(value, kind, f"{path}.")
    elif not is_kind(value, kind):
        raise ConfigError(f'"{path}" must be {_KIND_NAMES[kind]}, not {value!r}')


def is_kind(value: Any, kind: str) -> bool:
    """True when `value`, as read from the file, is of `kind` (see the top of this file)."""
    if kind == "any":
        return True
    if kind in ("bool", "str", "list"):
        return isinstance(value, {"bool": bool, "str": str, "list": list}[kind])
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return is_number and (kind == "number" or value == int(value))
