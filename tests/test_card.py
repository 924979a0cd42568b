"""The startup card's arithmetic, at the paper's size and against real tensors."""

import math

import pytest
import torch

from mlcd_ds.card import count_parameters, plan_memory, sampled_rows, startup_card
from mlcd_ds.config import DeepSpeedDefaults, RunConfig
from mlcd_ds.ds_config import BatchSizes, load_deepspeed_config, resolve_deepspeed_config
from mlcd_ds.models.text import text_preset
from mlcd_ds.models.vit import VisionTransformer, preset
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.schedule import resolve_run_length
from mlcd_ds.topology import Topology


def planned(file, world_size, device_type, samples, **flags):
    config = RunConfig(**{"deepspeed_config": file, "shards": "s", "labels": "l", "output_dir": "run"} | flags)
    raw = load_deepspeed_config(file)
    batch = BatchSizes.resolve(raw, world_size)
    length = resolve_run_length(config, samples_per_epoch=samples, global_batch=batch.global_batch)
    settings = resolve_deepspeed_config(
        raw,
        batch=batch,
        total_steps=length.total_steps,
        warmup_steps=length.warmup_steps,
        output_dir="run",
        device_type=device_type,
        defaults=DeepSpeedDefaults(),
    )
    return config, settings, length


def test_the_papers_run_on_the_card():
    config, settings, length = planned("ds_configs/vit_l14_80gpu.json", 80, "cuda", 400_000_000, model="vit_l14")
    encoder = preset("vit_l14")
    card = startup_card(
        config, settings, encoder, length,
        num_samples=400_000_000, num_shards=41_408, num_classes=(1_000_000,), world_size=80, device="cuda",
    )  # fmt: skip
    for words in (
        "80 on cuda, bfloat16, ZeRO stage 2",
        "32,800 images = 205 a micro-batch x 2 accumulated x 80 ranks",
        f"{math.ceil(32 * 400_000_000 / 32_800):,} steps",
        "2,000 steps of warm-up",
        "12,500 centers",
        "mlcd, 1,000,000 classes, l=8, r=0.1, S=64, arc margin 0.3 (straight_through)",
    ):
        assert words in card, card


def test_sampled_rows_by_both_budgets():
    config = RunConfig(deepspeed_config="x", shards="s", labels="l", output_dir="run")
    total = config.model_copy(update={"sample_budget": "total"})
    cd = config.model_copy(update={"objective": "cd"})
    # 4,096 x 8 labels name 32,240 of a million classes; 32,768 x 8 name 231 thousand: more than r = 0.1 of all.
    assert sampled_rows(total, 4096, 1_000_000, 8) == 12_500
    assert sampled_rows(config, 4096, 1_000_000, 8) == pytest.approx((32_240 + 0.1 * 967_760) / 8, rel=1e-3)
    assert sampled_rows(total, 32_768, 1_000_000, 1) == pytest.approx(230_600, rel=0.01)
    assert sampled_rows(config, 32_768, 1_000_000, 1) == pytest.approx(230_600 + 0.1 * 769_400, rel=0.01)
    assert sampled_rows(cd, 32_768, 1_000_000, 1) == pytest.approx(32_240 + 0.1 * 967_760, rel=1e-3)


def test_drawn_positives_stand_on_the_card_and_name_fewer_rows():
    base = {"deepspeed_config": "x", "shards": "s", "labels": "l", "output_dir": "run", "sample_rate": 0.01}
    two, all_of_two = RunConfig(**base, positives_drawn=2), RunConfig(**base, num_positives=2)
    assert sampled_rows(two, 4096, 1_000_000, 8) == sampled_rows(all_of_two, 4096, 1_000_000, 8)
    assert sampled_rows(two, 4096, 1_000_000, 8) < sampled_rows(RunConfig(**base), 4096, 1_000_000, 8)
    for objective, words in (("mlcd", "l=8 (2 drawn at each visit), "), ("cd", "of which cd takes the nearest")):
        config, settings, length = planned(
            "ds_configs/cpu.json", 2, "cpu", 1000, model="vit_toy", positives_drawn=2, objective=objective
        )
        card = startup_card(
            config, settings, preset("vit_toy"), length,
            num_samples=1000, num_shards=1, num_classes=(100,), world_size=2, device="cpu",
        )  # fmt: skip
        assert words in card


def test_memory_of_weights_and_head_is_that_of_real_tensors():
    config, settings, _ = planned("ds_configs/cpu.json", 2, "cpu", 1000, model="vit_toy")
    encoder = preset("vit_toy")
    model = VisionTransformer(encoder, seed=0)
    assert count_parameters(encoder) == sum(p.numel() for p in model.parameters())
    memory = plan_memory(encoder, settings, config, num_classes=(1001,), world_size=2)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert memory.resident["weights"] == weights
    assert memory.resident["moments of the weights"] == weights * 2 // 2  # two, split over two ranks at ZeRO 1
    head = PartialFC(1001, encoder.embed_dim, Topology(0, 2, 0, 2, torch.device("cpu")))
    assert memory.resident["centers"] == head.centers.numel() * 4
    assert memory.resident["moments of the centers"] == head.centers.numel() * 4 * 2 + len(head.centers) * 4
    assert memory.total == sum(memory.resident.values()) + max(sum(m.values()) for m in memory.moments.values())
    assert memory.total == sum(memory.parts.values())


def test_card_has_a_line_for_each_head_and_memory_for_all():
    config, settings, length = planned("ds_configs/cpu.json", 2, "cpu", 1000, model="vit_toy")
    values = config.model_dump() | {"labels": "image::text", "head_weights": "1,0.5"}
    both, encoder = RunConfig(**values), preset("vit_toy")
    card = startup_card(
        both, settings, encoder, length,
        num_samples=1000, num_shards=1, num_classes=(1001, 300), world_size=2, device="cpu",
    )  # fmt: skip
    lines = {line[2:15].strip(): line for line in card.splitlines()}
    assert "1,001 classes" in lines["head 0"] and "loss x 1, labels image" in lines["head 0"]
    assert "300 classes" in lines["head 1"] and "loss x 0.5, labels text" in lines["head 1"]
    assert "501 centers" in lines["rows a rank"] and "; 150 centers" in lines["rows a rank"]
    first, second = (plan_memory(encoder, settings, config, (k,), 2) for k in (1001, 300))
    together = plan_memory(encoder, settings, both, (1001, 300), 2)
    assert together.resident["centers"] == first.resident["centers"] + second.resident["centers"]
    one, other, both_of = (plan.moments["head"] for plan in (first, second, together))
    assert both_of["rows of the head"] == one["rows of the head"] + other["rows of the head"]
    assert both_of["workspace of the head"] == one["workspace of the head"]  # one at a time
    assert together.resident["weights"] == first.resident["weights"]
    assert both_of["activations"] == one["activations"]


@pytest.mark.parametrize(("file", "world_size", "model"), [
    ("vit_b32_8gpu", 8, "vit_b32"), ("vit_l14_8gpu", 8, "vit_l14"), ("vit_l14_80gpu", 80, "vit_l14"),
    ("vit_h14_zero3", 8, "vit_h14"),
])  # fmt: skip
def test_shipped_gpu_configs_fit_their_hardware_by_the_cards_estimate(file, world_size, model):
    config, settings, _ = planned(f"ds_configs/{file}.json", world_size, "cuda", 400_000_000, model=model)
    memory = plan_memory(preset(model), settings, config, num_classes=(1_000_000,), world_size=world_size)
    assert memory.total < 80e9, memory


def test_a_run_on_captions_has_a_text_tower_and_a_locked_tower_no_state():
    values = {"objective": "clip", "tokenizer": "t.json", "text_model": "text_toy", "labels": ""}
    config, settings, length = planned("ds_configs/cpu.json", 2, "cpu", 1000, model="vit_toy", **values)
    encoder, text = preset("vit_toy"), text_preset("text_toy", 128, vocabulary=500)
    locked = config.model_copy(update={"lock_image": True, "init_from": "run/"})
    of_text, of_image = (count_parameters(tower) for tower in (text, encoder))
    both, lit = (plan_memory(encoder, settings, each, (), 2, text) for each in (config, locked))
    assert both.resident["weights"] == lit.resident["weights"] == 4 * (of_text + of_image)
    assert both.resident["moments of the weights"] == 8 * (of_text + of_image) // 2
    assert lit.resident["moments of the weights"] == 8 * of_text // 2
    assert lit.moments["backward"]["activations"] < both.moments["backward"]["activations"]
    assert not any("centers" in part for part in both.parts) and both.total > lit.total
    for each, words in ((config, "both towers learn"), (locked, "the image tower stays as run/ has it (LiT)")):
        card = startup_card(
            each, settings, encoder, length,
            num_samples=1000, num_shards=1, num_classes=(), world_size=2, device="cpu", text=text,
        )  # fmt: skip
        assert "clip: 64 images against their captions" in card and words in card
        assert "text_toy, 32 tokens of 500" in card and "centers" not in card
