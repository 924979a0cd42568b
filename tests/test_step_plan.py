"""The plan of a run: its memory is what real processes take, its FLOPs and bytes those of real calls, its table true."""

import json
import re

import pytest
import torch
from memory_worker import CASES
from processes import ROOT, run_script

from mlcd_ds import step_plan
from mlcd_ds.config import PlanConfig
from mlcd_ds.ds_config import BatchSizes, load_deepspeed_config
from mlcd_ds.errors import ConfigError
from mlcd_ds.memory import count_parameters, kept_bytes
from mlcd_ds.models.recompute import resolve_recompute
from mlcd_ds.models.vit import VisionTransformer, VitConfig, preset

PAPER = "ds_configs/vit_l14_80gpu.json"


def planning(**changes) -> PlanConfig:
    return PlanConfig(**{"model": "vit_l14", "gpus": 80, "deepspeed_config": PAPER, "tflops": 790} | changes)


def plan(**changes) -> step_plan.StepPlan:
    config = planning(**changes)
    return step_plan.plan_step(config, load_deepspeed_config(str(ROOT / config.deepspeed_config)))


MEASURED = ("head, ZeRO 1", "activations, ZeRO 3")
"""Of the cases of memory_worker.py; the others take a gigabyte and a minute more, see docs/scaling.md."""


def test_memory_is_within_a_tenth_of_what_two_real_processes_take(tmp_path):
    """Two cases; docs/scaling.md has all twelve, within 2%."""
    result = tmp_path / "result.json"
    (ended,) = run_script(1, [ROOT / "tests" / "memory_worker.py", result, *MEASURED], timeout=600, fresh=True)
    assert ended.code == 0, ended.output[-3000:]
    for name, found in json.loads(result.read_text()).items():
        assert found["planned"] == pytest.approx(found["measured"], rel=0.1), name
        print(f"{name}: measured {found['measured'] / 1e6:.0f} MB, planned {found['planned'] / 1e6:.0f} MB")
    assert set(MEASURED) <= set(CASES)


@pytest.mark.parametrize(
    ("rope", "mlp", "layers", "activation"),
    [(False, 128, 3, "gelu"), (False, 128, 6, "gelu"), (True, 160, 3, "gelu"), (False, 128, 6, "quick_gelu")],
)
def test_activations_are_what_autograd_keeps(rope, mlp, layers, activation):
    """Bytes of all saved tensors, each storage once, but for the weights."""
    encoder = VitConfig(
        image_size=64, patch_size=8, layers=layers, width=32, heads=2, mlp_width=mlp, embed_dim=16, rope=rope,
        activation=activation, norm_eps=1e-5,
    )  # fmt: skip
    raw = load_deepspeed_config(str(ROOT / "ds_configs/cpu.json"))
    del raw["activation_checkpointing"]
    settings = step_plan.plan_step(planning(model="vit_toy", gpus=1, device="cpu"), raw).settings
    model = VisionTransformer(encoder, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randint(0, 256, (settings.micro_batch, 3, 64, 64), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    nothing_again = resolve_recompute(None, None, encoder.layers)
    assert kept_bytes(encoder, settings, nothing_again) == pytest.approx(sum(kept.values()), rel=0.03)
    del output


@pytest.mark.parametrize(("checkpoint_layers", "again"), [(None, 0), ("all", 24), (6, 6), ("selective", 0)])
def test_recomputed_blocks_are_paid_for(checkpoint_layers, again):
    forward, both, block = step_plan.encoder_flops(preset("vit_l14"))
    found = plan(checkpoint_layers=checkpoint_layers).encoder_flops / 410
    assert found == pytest.approx(both + min(again * block, forward))
    assert block == pytest.approx(2 * (257 * 12 * 1024**2 + 2 * 257**2 * 1024))


def test_the_papers_run_by_hand():
    found = plan()
    forward, both, _ = step_plan.encoder_flops(preset("vit_l14"))
    assert forward == pytest.approx(156.4e9, rel=0.001)  # of the last block's tokens the class token alone
    assert found.encoder_flops == both * 410
    tokens = 205 * 257
    seconds = found.encoder_flops / (790e12 * 0.5 * tokens / (tokens + step_plan.FILL_TOKENS))
    assert found.seconds["encoder"] == pytest.approx(seconds)
    assert found.days == pytest.approx(32 * 4e8 / found.images_per_second / 86400)
    by_name = {one.name: one for one in found.collectives}
    G, D = 80 * 205, 768
    assert by_name["embeddings"].size == 2 * G * D and by_name["embeddings"].times == 2
    assert by_name["embeddings' gradient"].sent(80) == pytest.approx(4 * G * D * 79 / 80)
    assert by_name["ZeRO 2: weights"].size == 2 * count_parameters(preset("vit_l14"))
    assert found.fits and not plan(gpu_gb=40).fits


def test_twice_the_machines_is_nearly_twice_as_fast_until_the_loader_is_the_limit():
    speeds = [plan(gpus=gpus).images_per_second for gpus in (40, 80, 160)]
    assert 1.8 < speeds[1] / speeds[0] < 2 and 1.8 < speeds[2] / speeds[1] < 2
    slow = plan(images_per_core=10)
    assert slow.images_per_second == 80 * 12 * 10
    assert "THE LOADER IS THE LIMIT" in step_plan.card(slow, "given", load_deepspeed_config(str(ROOT / PAPER)))


def test_suggestion_fits_and_nothing_that_fits_is_faster():
    raw = load_deepspeed_config(str(ROOT / PAPER))
    config = planning(model="vit_h14", gpus=64, gpu_gb=40)
    best, json_ = step_plan.suggest(config, raw)
    assert best.fits and best.settings.global_batch == 32_768 == json_["train_batch_size"]
    again = step_plan.plan_step(config, json_)  # what is printed is what was planned
    assert again.step_seconds == best.step_seconds and again.memory.total == best.memory.total
    for _, other, changed in step_plan.variants(config, json_):
        if other == config:
            candidate = step_plan.plan_step(other, changed)
            assert not candidate.fits or candidate.step_seconds > 0.989 * best.step_seconds
    with pytest.raises(ConfigError, match=r"nothing fits 1 GB on 64 GPUs: the least is"):
        step_plan.suggest(config.model_copy(update={"gpu_gb": 1.0}), raw)


@pytest.mark.parametrize("gpus", [2, 4096])
def test_a_pretended_group_counts_the_planned_bytes(gpus):
    raw = load_deepspeed_config(str(ROOT / PAPER)) | {
        "train_batch_size": 2 * gpus, "train_micro_batch_size_per_gpu": 2
    }  # fmt: skip
    config = planning(model="vit_ti", gpus=gpus, num_classes=100_000)
    text = step_plan.compare_pretended(step_plan.plan_step(config, raw))
    assert f"among {gpus} pretended ranks" in text
    wrong = step_plan.plan_step(config, raw | {"train_batch_size": 4 * gpus, "train_micro_batch_size_per_gpu": 4})
    object.__setattr__(wrong, "config", config.model_copy(update={"gather_precision": "float32"}))
    object.__setattr__(wrong, "settings", step_plan.plan_step(config, raw).settings)
    assert "counted bytes" in step_plan.compare_pretended(wrong)


def test_the_tool_prints_all_parts():
    text = step_plan.card(plan(), "given", load_deepspeed_config(str(ROOT / PAPER)))
    for words in (
        "activations", "moments of the centers", "gathered embeddings", "embeddings' gradient", "GPU-hours", "ZeRO 3",
        "micro-batch x 2", "fits 80 GB", "seconds of a step: encoder",
    ):  # fmt: skip
        assert words in text, words
    flags = ["--model=vit_l14", "--gpus=7", f"--deepspeed_config={PAPER}", "--tflops=790"]
    (wrong,) = run_script(1, [ROOT / "tools" / "plan.py", *flags], fresh=True)
    assert wrong.code == 2 and "error: the batch sizes do not fit 7 ranks" in wrong.output


def rows_of_the_page() -> list[list[str]]:
    text = (ROOT / "docs/scaling.md").read_text()
    return [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in re.findall(r"^\| `vit_\w+\.json` \|.*\|$", text, re.MULTILINE)
    ]


def test_the_pages_table_is_what_the_tool_says_and_every_file_fits():
    rows = rows_of_the_page()
    names = {path.name for path in (ROOT / "ds_configs").glob("vit_*.json")}
    assert {row[0].strip("`") for row in rows} == names
    for file, sizes, _, memory, speed, *_ in rows:
        name = file.strip("`")
        model, gpus = re.match(r"(vit_\w+?)_(?:(\d+)gpu|zero3)", name).groups()
        raw = load_deepspeed_config(str(ROOT / "ds_configs" / name))
        small = "40gb" in name or "zero3" in name
        found = plan(
            model=model, gpus=int(gpus or 8), deepspeed_config=f"ds_configs/{name}", gpu_gb=40 if small else 80
        )
        assert found.fits, name
        batch = BatchSizes.resolve(raw, found.config.gpus)
        assert sizes == f"{batch.micro_batch} x {batch.accumulation}", name
        assert float(memory.split()[0]) == pytest.approx(found.memory.total / 1e9, abs=0.06), name
        assert float(speed.replace(",", "")) == pytest.approx(batch.global_batch / found.step_seconds, rel=0.01), name
