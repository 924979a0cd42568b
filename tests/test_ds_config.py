"""The DeepSpeed JSON: each trap is a right value or a clear error, and what comes out is what DeepSpeed takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlcd_ds import ds_keys
from mlcd_ds.config import DeepSpeedDefaults
from mlcd_ds.ds_config import BatchSizes, DeepSpeedSettings, load_deepspeed_config, resolve_deepspeed_config
from mlcd_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {  # file: world sizes it is for
    "cpu.json": (1, 2),
    "reproduce.json": (1,),
    "vit_b32_8gpu.json": (1, 2, 4, 8, 16),
    "vit_l14_8gpu.json": (8,),
    "vit_l14_80gpu.json": (40, 80, 160),
    "vit_h14_zero3.json": (8, 16, 32, 40, 80, 160),
    "finetune_8gpu.json": (1, 2, 4, 8, 16),
    **{f"vit_{name}_1gpu.json": (1,) for name in ("b32", "b16", "l14", "l14_336", "h14", "bigg14")},
    **{f"vit_{name}_8gpu.json": (8,) for name in ("b16", "l14_336", "h14", "bigg14")},
    **{f"vit_{name}_80gpu.json": (80,) for name in ("b32", "b16", "l14_336", "h14", "bigg14")},
    **{f"vit_{name}_256gpu.json": (256,) for name in ("b32", "b16", "l14", "l14_336", "h14", "bigg14")},
    "vit_bigg14_256gpu_40gb.json": (256,),
}
ON_CPUS = ("cpu.json", "reproduce.json")
CHECKPOINTED = ("cpu.json", "vit_h14_zero3.json")
BATCHES = {"cpu.json": 64, "reproduce.json": 64, "finetune_8gpu.json": 1024} | {
    name: 32_768 for name in SHIPPED if "_256gpu" in name
}
"""Images of a step where they are not the paper's 32,800."""


def minimal(**changes) -> dict:
    raw = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        **changes,
    }
    return {key: value for key, value in raw.items() if value is not ...}


def resolve(raw: dict, world_size=2, total=1000, warmup=100, device="cpu", output_dir="run") -> DeepSpeedSettings:
    return resolve_deepspeed_config(
        raw,
        batch=BatchSizes.resolve(raw, world_size),
        total_steps=total,
        warmup_steps=warmup,
        output_dir=output_dir,
        device_type=device,
        defaults=DeepSpeedDefaults(),
    )


def optimizer(**params) -> dict:
    params = {"lr": 1e-3, "weight_decay": 0.1, **params}
    return {"type": "AdamW", "params": {key: value for key, value in params.items() if value is not ...}}


def cosine(**params) -> dict:
    return {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", **params}}


def contains_auto(value) -> bool:
    if isinstance(value, dict):
        return any(contains_auto(item) for item in value.values())
    return value == "auto" or (isinstance(value, list) and any(contains_auto(item) for item in value))


def deepspeed_reads(settings: DeepSpeedSettings, world_size: int, monkeypatch):
    """DeepSpeed's own reading of the resolved dict; only its view of the process group is replaced."""
    import deepspeed.runtime.config as runtime_config

    class Ranks:
        get_rank = staticmethod(lambda: 0)
        get_world_size = staticmethod(lambda group=None: world_size)

    monkeypatch.setattr(runtime_config, "dist", Ranks)
    return runtime_config.DeepSpeedConfig(json.loads(json.dumps(settings.json)))


# --- the shipped files -------------------------------------------------------------------------------------------


def test_all_shipped_files_are_listed_here():
    assert {path.name for path in (ROOT / "ds_configs").glob("*")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_opens_with_purpose_hardware_and_command(name):
    head = (ROOT / "ds_configs" / name).read_text().split("\n{", 1)[0]
    assert head.startswith("// For: ")
    assert "\n// Hardware: " in head
    assert "\n// Command" in head
    kind = name.split("_")[0].removesuffix(".json")
    tool = {"finetune": "tools/finetune.py", "reproduce": "tools/reproduce.py"}.get(kind, "mlcd_ds/train.py")
    assert f"{tool} --deepspeed_config ds_configs/{name}" in head
    of_the_tool = {"finetune": ("--shards", "--test_shards", "--init_from"), "reproduce": ("--root",)}
    for flag in (*of_the_tool.get(kind, ("--shards", "--labels", "--model")), "--output_dir"):
        assert flag in head


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deepspeed_accepts_shipped_file_and_reads_what_we_say(name, device, monkeypatch):
    raw = load_deepspeed_config(str(ROOT / "ds_configs" / name))
    for world_size in SHIPPED[name]:
        settings = resolve(raw, world_size, device=device)
        theirs = deepspeed_reads(settings, world_size, monkeypatch)
        assert not contains_auto(settings.json)
        assert theirs.train_batch_size == settings.global_batch == BATCHES.get(name, 32_800)
        assert theirs.train_micro_batch_size_per_gpu == settings.micro_batch
        assert theirs.gradient_accumulation_steps == settings.accumulation
        assert settings.images_per_rank * world_size == settings.global_batch
        assert theirs.zero_optimization_stage == settings.zero_stage
        assert theirs.bfloat16_config.enabled == (settings.precision == "bfloat16") == (name not in ON_CPUS)
        assert theirs.float16_config.enabled is False
        assert theirs.gradient_clipping == settings.gradient_clipping == 1.0
        assert theirs.optimizer_name == "adamw"
        assert theirs.optimizer_params["lr"] == settings.learning_rate
        assert theirs.optimizer_params["torch_adam"] == (device == "cpu" or name in ON_CPUS)
        assert theirs.grad_accum_dtype == ("fp32" if name not in ON_CPUS else None)
        assert theirs.scheduler_params["warmup_type"] == "linear"
        assert theirs.scheduler_params["total_num_steps"] == 1000
        assert theirs.monitor_config.tensorboard.enabled
        assert Path(theirs.monitor_config.tensorboard.output_path, theirs.monitor_config.tensorboard.job_name) == Path(
            "run/tensorboard"
        )
        assert theirs.checkpoint_tag_validation_fail
    rates = {"cpu.json": 1e-3, "reproduce.json": 1e-3, "finetune_8gpu.json": 5e-4, "vit_b": 5e-4}
    assert settings.learning_rate == rates.get(name, 4e-4 if re.match("vit_(l|h|bigg)", name) else rates["vit_b"])
    assert settings.weight_decay == (0.05 if name in (*ON_CPUS, "finetune_8gpu.json") else 0.2)
    assert settings.activation_checkpointing == (name in CHECKPOINTED)


def test_the_cpu_schedule_in_deepspeeds_own_class_ends_where_the_run_does():
    """It rises to lr, falls from then on, and the last step still learns."""
    from deepspeed.runtime.lr_schedules import WarmupCosineLR

    settings = resolve(load_deepspeed_config(str(ROOT / "ds_configs/cpu.json")), total=200, warmup=20)
    params = settings.json["optimizer"]["params"]
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=params["lr"])
    schedule = WarmupCosineLR(adam, **settings.json["scheduler"]["params"])
    rates = []
    for _ in range(200):
        rates.append(adam.param_groups[0]["lr"])
        adam.step()
        schedule.step()
    assert max(rates) == rates[21] == pytest.approx(settings.learning_rate, rel=1e-3)
    # DeepSpeed's counter starts at -1 and its ramp at 0, so two steps are taken at a rate of 0.
    assert rates[:3] == pytest.approx([0, 0, settings.learning_rate / 20])
    assert rates[22:] == sorted(rates[22:], reverse=True)
    assert 0 < rates[-1] < 0.01 * settings.learning_rate


# --- our tables against the installed DeepSpeed ------------------------------------------------------------------


def test_every_key_that_deepspeed_removed_is_refused_with_a_cure():
    import deepspeed.runtime.config as runtime_config

    removed = set(runtime_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{key}" for key in runtime_config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed == set(ds_keys.REMOVED_KEYS)
    for key in removed:
        block = {"enabled": False}
        raw = minimal(**{key: block} if "." not in key else {"zero_optimization": {key.split(".")[1]: block}})
        with pytest.raises(ConfigError, match=rf'"{re.escape(key)}" is not supported: .*Remove'):
            resolve(raw)


def test_every_key_of_deepspeeds_typed_blocks_is_known_or_refused_here():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
    }
    for path, model in models.items():
        ours = ds_keys.KNOWN_KEYS
        for part in path.split("."):
            ours = ours[part]
        refused = {key.removeprefix(f"{path}.") for key in ds_keys.UNSUPPORTED_KEYS if key.startswith(f"{path}.")}
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        assert set(ours) <= theirs, path
        assert theirs <= set(ours) | refused, path


def test_every_top_level_key_that_deepspeed_reads_is_known_or_refused_here():
    import deepspeed.runtime.config as runtime_config

    seen = set()

    class Spy(dict):
        def get(self, key, default=None):
            seen.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            seen.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

    spy = Spy(train_batch_size=8, train_micro_batch_size_per_gpu=8)
    config = object.__new__(runtime_config.DeepSpeedConfig)
    config._initialize_params(spy)
    ours = {*ds_keys.KNOWN_KEYS, *ds_keys.UNSUPPORTED_KEYS, *ds_keys.REMOVED_KEYS, "bfloat16"}
    assert len(seen) > 30
    assert seen <= ours, seen - ours


def test_activation_checkpointing_and_scheduler_keys_are_deepspeeds():
    import inspect

    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT

    assert set(ds_keys.KNOWN_KEYS["activation_checkpointing"]) == set(ACT_CHKPT_DEFAULT)
    for name, keys in ds_keys.SCHEDULERS.items():
        theirs = set(inspect.signature(getattr(lr_schedules, name)).parameters) - {"optimizer", "last_batch_iteration"}
        assert set(keys) == theirs, name


# --- the file ----------------------------------------------------------------------------------------------------


def test_comments_bare_keys_and_large_numbers_are_fine(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(
        "﻿# pasted\n{\n // two styles\n train_batch_size: 64, /* here */ train_micro_batch_size_per_gpu: 8\n"
        ' "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}, # size\n'
        ' "optimizer": {"type": "AdamW", "params": {"lr": 4e-4, "weight_decay": 0.2}},\n}\n'
    )
    settings = resolve(load_deepspeed_config(str(file)))
    assert settings.json["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert isinstance(settings.json["zero_optimization"]["reduce_bucket_size"], int)
    assert settings.learning_rate == 4e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "train_batch_size": 64,\n "zero_optimization": {"stage": 1\n "bf16": {}\n}', "line 5"),
        ('{"train_batch_size": 64', "line 1"),
        ('{"train_batch_size": 64}}', "not valid JSON"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "key 'stage' stands twice in the block with the keys"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "'train_batch_size' stands twice"),
        ("[1, 2]", "must hold one object"),
        ("", "must hold one object"),
        ('{"train_batchsize": 64}', 'unknown key "train_batchsize": did you mean "train_batch_size"?'),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, text, message):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_config(str(file))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_an_absent_file_is_not_taken_for_base64(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist\. The shipped ones are in ds_configs/"):
        load_deepspeed_config(str(tmp_path / "no.json"))
    with pytest.raises(ConfigError, match=r"Did you mean .*vit_l14_8gpu\.json\?"):
        load_deepspeed_config(str(ROOT / "ds_configs/vit_l14_8gpus.json"))
    with pytest.raises(ConfigError, match="is a folder"):
        load_deepspeed_config(str(tmp_path))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_deepspeed_config(str(tmp_path / "binary.json"))


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_cliping": 1.0}, 'unknown key "gradient_cliping": did you mean "gradient_clipping"?'),
        ({"stage": 2}, 'unknown key "stage": it belongs to a block: "zero_optimization.stage"'),
        ({"made_up_thing": 2}, "DeepSpeed would ignore it. Remove it"),
        ({"activation_checkpointing": {"partitioned_activations": True}}, '.partition_activations"?'),
        ({"activation_checkpointing": {"enabled": True}}, "the block alone turns activation checkpointing on"),
        ({"scheduler": cosine(warmup_steps=5)}, 'did you mean "scheduler.params.warmup_num_steps"?'),
        ({"scheduler": cosine(warmup_max_lr=1e-3)}, 'unknown key "scheduler.params.warmup_max_lr"'),
        ({"scheduler": {"type": "OneCycle"}}, "must be one of WarmupLR, WarmupDecayLR, WarmupCosineLR"),
        ({"scheduler": {"typ": "WarmupLR"}}, '"scheduler.typ"'),
        ({"optimizer": optimizer(learning_rate=1)}, '"optimizer.params.learning_rate"'),
        ({"optimizer": optimizer(weight_decy=1)}, 'did you mean "optimizer.params.weight_decay"?'),
        ({"optimizer": optimizer(max_grad_norm=1)}, 'clipping is "gradient_clipping" at the top level'),
        ({"optimizer": {"type": "OneBitAdam", "params": {}}}, "1-bit optimizers are gone"),
        ({"optimizer": {"type": "Lamb", "params": {}}}, "\"optimizer.type\" is 'Lamb'"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, "has no optimizer"),
        ({"optimizer": ...}, "has no optimizer"),
        ({"optimizer": optimizer(lr=...)}, '"optimizer.params.lr" is missing'),
        ({"optimizer": optimizer(weight_decay=...)}, '"optimizer.params.weight_decay" is missing'),
        ({"optimizer": optimizer(lr="auto")}, '"optimizer.params.lr" is "auto", which nothing resolves'),
        ({"optimizer": optimizer(lr="1e-3")}, "\"optimizer.params.lr\" must be a number, not '1e-3'"),
        ({"optimizer": optimizer(lr=0)}, "must be above 0"),
        ({"optimizer": optimizer(weight_decay=-1)}, "must be at least 0"),
        ({"optimizer": optimizer(betas=[0.9])}, "two numbers in [0, 1)"),
        ({"optimizer": optimizer(betas=[0.9, 1.0])}, "two numbers in [0, 1)"),
        ({"optimizer": optimizer(adam_w_mode=False)}, '"adam_w_mode" is false'),
        ({"optimizer": optimizer(bias_correction=False)}, "does not go with"),
        ({"fp16": {"enabled": True}}, 'Write "bf16": {"enabled": true} instead'),
        ({"torch_autocast": {"enabled": True}}, '"torch_autocast" is not supported'),
        ({"pipeline": {"stages": 2}}, "data parallel only"),
        ({"moe": {}}, "data parallel only"),
        ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, '"zero_optimization.stage" is "auto", which nothing resolves'),
        ({"zero_optimization": True}, '"zero_optimization" must be a block'),
        ({"zero_optimization": {"overlap_com": True}}, '.overlap_comm"?'),
        ({"zero_optimization": {"cpu_offload": True}}, '"offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "need the norm"),
        ({"gradient_clipping": "1.0"}, '"gradient_clipping" must be a number'),
        ({"gradient_clipping": None}, '"gradient_clipping" is null'),
        ({"gradient_clipping": -1}, "must be 0 (off) or a norm above 0"),
        ({"gradient_allreduce_op": "sum"}, '"gradient_allreduce_op" must be "mean"'),
        ({"prescale_gradients": True}, '"prescale_gradients" must be false'),
        ({"managed_gradient_accumulation": False}, '"managed_gradient_accumulation" must be true'),
        ({"gradient_predivide_factor": 2.0}, '"gradient_predivide_factor" must be 1'),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "set the stage to 1"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "in float32 it may be 'fp32'"),
        ({"data_types": {"param_dtype": "bf16"}}, "but the run is in float32"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float16"}}, "in bfloat16 it may be"),
        ({"communication_data_type": "fp16"}, 'it may be "fp32" or "bf16"'),
        ({"bf16": {}, "bfloat16": {}}, "two names of one block"),
        ({"scheduler": cosine(warmup_type="cosine")}, 'must be "linear" or "log"'),
        ({"scheduler": cosine(total_num_steps=999)}, "but the run has 1000 steps"),
        ({"scheduler": cosine(warmup_num_steps=1000)}, 'Write "auto"'),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}}}, 'Leave "warmup_max_lr" out'),
        ({"wandb": {"enabled": True, "entity": "us"}}, 'its name is "team"'),
        ({"checkpoint": {"load_universal": True}}, "resuming decides this"),
        ({"checkpoint": {"tag_validation": "maybe"}}, "must be Warn, Ignore or Fail"),
        ({"steps_per_print": 0}, "leave it out for silence"),
        ({"train_batch_size": 64.5}, "must be a whole number, not 64.5"),
        ({"train_batch_size": True}, "must be a whole number, not True"),
    ],
)
def test_traps_are_errors_with_a_cure(changes, message):
    with pytest.raises(ConfigError) as caught:
        resolve(minimal(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unsupported_blocks_that_are_off_are_let_go():
    off = {"enabled": False}
    settings = resolve(
        minimal(
            torch_autocast=off, hybrid_engine=off, data_efficiency=off, fp16=off, zero_optimization={"zenflow": off}
        )
    )
    assert not {"torch_autocast", "hybrid_engine", "data_efficiency", "fp16"} & set(settings.json)
    assert settings.json["zero_optimization"] == {"stage": 0}


def test_a_monitor_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed: pip install wandb"):
        resolve(minimal(wandb={"enabled": True}))


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [
        ((64, 8, None), 2, (64, 8, 4)),
        ((64, 8, "auto"), 4, (64, 8, 2)),
        ((64, "auto", 4), 2, (64, 8, 4)),
        ((64, "auto", "auto"), 2, (64, 32, 1)),
        (("auto", 8, 4), 3, (96, 8, 4)),
        ((None, 8, None), 3, (24, 8, 1)),
        ((64, 8, 4), 2, (64, 8, 4)),
    ],
)
def test_two_batch_sizes_give_the_third(sizes, world_size, expected, monkeypatch):
    raw = minimal(**{key: ... for key in ds_keys.TOP_LEVEL_BATCH_KEYS})
    raw.update({k: v for k, v in zip(ds_keys.TOP_LEVEL_BATCH_KEYS, sizes, strict=True) if v is not None})
    batch = BatchSizes.resolve(raw, world_size)
    assert (batch.global_batch, batch.micro_batch, batch.accumulation) == expected
    assert batch.images_per_rank == batch.global_batch // world_size
    assert len(batch.notes) == (sizes != (64, 8, 4)), "what was worked out is told"
    theirs = deepspeed_reads(resolve(raw, world_size), world_size, monkeypatch)
    assert theirs.train_batch_size == batch.global_batch


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ((256, 128, None), 3, "256 .*128 .*3 ranks = 384.* near 3 that fit: 1, 2$"),
        ((32_800, 205, None), 64, "near 64 that fit: 10, 16, 20, 32, 40, 80$"),
        ((64, 8, 4), 4, '= 128.* near 4 that fit: 2; or leave "gradient_accumulation_steps" out'),
        ((64, None, None), 3, "near 3 that fit: 1, 2, 4, 8"),
        ((64, 100, None), 1, "no number fits"),
        ((None, None, 4), 1, "no batch size"),
        ((0, 8, None), 1, '"train_batch_size" is 0: it must be at least 1'),
    ],
)
def test_batch_sizes_that_do_not_fit_show_the_numbers_and_what_would(sizes, world_size, message):
    raw = {k: v for k, v in zip(ds_keys.TOP_LEVEL_BATCH_KEYS, sizes, strict=True) if v is not None}
    with pytest.raises(ConfigError, match=message):
        BatchSizes.resolve(raw, world_size)


def test_auto_is_resolved_everywhere_it_may_stand_and_told(monkeypatch):
    raw = minimal(
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        optimizer=optimizer(betas="auto", eps="auto", torch_adam="auto"),
        scheduler={
            "type": "WarmupDecayLR",
            "params": dict.fromkeys(("total_num_steps", "warmup_num_steps", "warmup_min_lr", "warmup_max_lr"), "auto"),
        },
        bf16={"enabled": "auto"},
        fp16={"enabled": "auto"},
        data_types={"keep_in_fp32_modules": "auto"},
        zero_optimization={
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    )
    before = json.dumps(raw)
    for device, precision in (("cpu", "float32"), ("cuda", "bfloat16")):
        settings = resolve(raw, device=device)
        assert not contains_auto(settings.json)
        assert settings.precision == precision
        assert settings.json["optimizer"]["params"]["torch_adam"] is (device == "cpu")
        theirs = deepspeed_reads(settings, 2, monkeypatch)
        assert theirs.bfloat16_config.enabled is (device == "cuda")
        notes = "\n".join(settings.notes)
        for key in ("accumulation", "gradient_clipping", "betas", "eps", "total_num_steps", "warmup_num_steps"):
            assert key in notes
        for key in ("warmup_max_lr", "bf16.enabled", "fp16.enabled", "reduce_bucket_size", "prefetch", "persistence"):
            assert key in notes
    assert json.dumps(raw) == before, "the raw dict is the caller's"
    params = settings.json["scheduler"]["params"]
    assert params == {
        "total_num_steps": 1000,
        "warmup_num_steps": 100,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 1e-3,
        "warmup_type": "linear",
    }
    assert (settings.betas, settings.eps) == ((0.9, 0.999), 1e-8)


def test_what_deepspeed_would_default_silently_is_made_explicit():
    settings = resolve(minimal(scheduler=cosine()))
    assert settings.json["gradient_clipping"] == 1.0
    assert settings.json["scheduler"]["params"]["warmup_type"] == "linear"
    assert settings.json["checkpoint"]["tag_validation"] == "Fail"
    assert settings.json["timers"] == {"throughput": {"enabled": False}}
    assert settings.json["optimizer"]["params"]["torch_adam"] is True
    notes = "\n".join(settings.notes)
    for word in ("gradient_clipping 1.0", "warmup_type linear", "torch_adam", "throughput timer off"):
        assert word in notes
    assert "constant" in "\n".join(resolve(minimal()).notes)
    assert resolve(minimal(gradient_clipping=0)).gradient_clipping == 0.0
    assert "timers" not in resolve(minimal(steps_per_print=10)).json


def test_the_accumulation_type_follows_the_stage():
    for stage, expected in ((0, "bf16"), (1, "fp32"), (2, "fp32"), (3, "fp32")):
        settings = resolve(minimal(bf16={"enabled": True}, zero_optimization={"stage": stage}))
        assert settings.json["data_types"]["grad_accum_dtype"] == expected
        assert any("accumulate in" in note for note in settings.notes)
        assert any("hundred times slower" in note for note in settings.notes)
    kept = resolve(
        minimal(bf16={"enabled": True}, zero_optimization={"stage": 1}, data_types={"grad_accum_dtype": "bfloat16"})
    )
    assert kept.json["data_types"]["grad_accum_dtype"] == "bf16"
    assert "data_types" not in resolve(minimal()).json


def test_the_old_name_of_bf16_works():
    settings = resolve(minimal(bfloat16={"enabled": True}, zero_optimization={"stage": 1}), device="cuda")
    assert settings.precision == "bfloat16"
    assert "bf16" in settings.json and "bfloat16" not in settings.json


def test_a_gpu_without_bfloat16_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    with pytest.raises(ConfigError, match="V100 has no bfloat16"):
        resolve(minimal(bf16={"enabled": True}), device="cuda")
    assert resolve(minimal(), device="cuda").precision == "float32"


def test_schedules_longer_than_the_run_and_other_warmups_are_told():
    settings = resolve(minimal(scheduler=cosine(total_num_steps=5000, warmup_num_steps=7)))
    notes = "\n".join(settings.notes)
    assert "made for 5000 steps, the run stops after 1000" in notes
    assert "warm-up of 7 steps, from the JSON" in notes
    assert settings.json["scheduler"]["params"]["warmup_num_steps"] == 7


@pytest.mark.parametrize("kind", sorted(ds_keys.SCHEDULERS))
def test_no_warmup_starts_at_the_full_rate(kind):
    import deepspeed.runtime.lr_schedules as lr_schedules

    settings = resolve(minimal(scheduler={"type": kind}), warmup=0)
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    schedule = getattr(lr_schedules, kind)(adam, **settings.json["scheduler"]["params"])
    rates = []
    for _ in range(3):
        adam.step()
        schedule.step()
        rates.append(adam.param_groups[0]["lr"])
    assert rates == pytest.approx([settings.learning_rate] * 3, rel=0.01)


def test_activation_checkpointing_acts_by_its_presence():
    assert not resolve(minimal()).activation_checkpointing
    assert resolve(minimal(activation_checkpointing={})).activation_checkpointing
    copied = {"partition_activations": True, "contiguous_memory_optimization": True, "cpu_checkpointing": True}
    for device, waits_on_the_host in (("cuda", True), ("cpu", False)):
        settings = resolve(minimal(activation_checkpointing=copied), device=device)
        assert settings.json["activation_checkpointing"] == {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": waits_on_the_host,
        }
        assert sum("no model parallelism" in note for note in settings.notes) == 2
        assert any("in host memory as it is" in note for note in settings.notes) != waits_on_the_host


def test_logs_go_to_the_run_folder_unless_told_otherwise():
    settings = resolve(minimal(tensorboard={"enabled": True}, csv_monitor={"enabled": True, "output_path": ""}))
    assert settings.json["tensorboard"] == {"enabled": True, "output_path": "run", "job_name": "tensorboard"}
    assert settings.json["csv_monitor"] == {"enabled": True, "output_path": "run", "job_name": "csv"}
    own = {"enabled": True, "output_path": "elsewhere", "job_name": "mine"}
    assert resolve(minimal(tensorboard=own)).json["tensorboard"] == own
    assert resolve(minimal(tensorboard={"enabled": False})).json["tensorboard"] == {"enabled": False}


def test_offload_on_a_cpu_is_dropped_and_on_a_gpu_kept():
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "offload_optimizer" not in resolve(minimal(zero_optimization=offload)).json["zero_optimization"]
    kept = resolve(minimal(zero_optimization=offload), device="cuda")
    assert kept.json["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    with pytest.raises(ConfigError, match="needs stage 3"):
        resolve(minimal(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}), device="cuda")


TRAINER = """
import json, sys
import deepspeed, torch
from mlcd_ds.topology import Topology
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
Topology.single().start(1.0)
deepspeed.init_distributed("gloo")
for name, config in json.load(open(sys.argv[1])).items():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if "activation_checkpointing" in config:
        deepspeed.checkpointing.configure(None, deepspeed_config=config)
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    for _ in range(4 * engine.gradient_accumulation_steps()):
        engine.backward(engine(torch.ones(4, 8, dtype=dtype)).float().square().mean())
        engine.step()
    assert engine.global_steps == 4 and engine.skipped_steps == 0
    print("trained", name, engine.get_lr()[0], flush=True)
    engine.destroy()
"""


def test_deepspeed_trains_with_every_shipped_file(tmp_path):
    """The optimizer classes, buckets and schedules of each file, in DeepSpeed itself; only the batch is made small."""
    configs = {}
    for name in SHIPPED:
        raw = load_deepspeed_config(str(ROOT / "ds_configs" / name))
        raw.update(train_batch_size=8, train_micro_batch_size_per_gpu=4)
        configs[name] = resolve(raw, world_size=1, total=100, warmup=10, output_dir=str(tmp_path / name)).json
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "configs.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    for name, config in configs.items():
        rate = float(re.search(rf"trained {name} (\S+)", result.stdout).group(1))
        assert rate == pytest.approx(
            config["optimizer"]["params"]["lr"] * 3 / 10
        )  # the counter stands at 3 after 4 steps
        assert list((tmp_path / name / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("raw", "world_size", "expected"),
    [
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 12}, 2, (12, 1)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 12}, 1, (12, 2)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 12}, 3, (8, 1)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 5}, 2, (4, 3)),
        ({"train_micro_batch_size_per_gpu": 12}, 1, (12, 2)),
        ({"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2}, 1, (6, 4)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 12, "gradient_accumulation_steps": 1}, 1, (12, 2)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 2}, 3, (4, 2)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 2}, 8, (1, 3)),
        ({"train_batch_size": 24}, 4, (6, 1)),
    ],
)
def test_global_batch_of_a_resumed_run_stays(raw, world_size, expected):
    """24 images on any number of ranks that divides it, in forward passes no larger than the JSON's; and it says so."""
    batch = BatchSizes.resolve(raw, world_size, going_on_with=24)
    assert (batch.micro_batch, batch.accumulation) == expected
    assert batch.global_batch == batch.micro_batch * batch.accumulation * world_size == 24
    given = raw.get("train_micro_batch_size_per_gpu"), raw.get("gradient_accumulation_steps")
    assert bool(batch.notes) == (given != expected)


def test_ranks_that_cannot_share_the_global_batch_of_a_resumed_run():
    with pytest.raises(ConfigError, match="of 24 images, which 7 ranks cannot share evenly.*: 2, 3, 4, 6, 8, 12"):
        BatchSizes.resolve({"train_batch_size": 24}, 7, going_on_with=24)
    # Another global batch in the JSON is for the run folder to refuse.
    assert BatchSizes.resolve({"train_batch_size": 48}, 2, going_on_with=24).global_batch == 48
