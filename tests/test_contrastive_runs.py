"""Runs on captions: gradients through DeepSpeed equal the definition's; runs resume; what they leave serves the tools."""

import json
import shutil

import pytest
import torch
from contrastive_worker import COMBINATIONS, MISSING, pairs, towers
from data_factory import picture
from processes import ROOT, run_script
from safetensors.torch import load_file

from mlcd_ds import checkpoint, checkpoint_tools
from mlcd_ds.batch import NO_IMAGE
from mlcd_ds.config import ConsolidateConfig, ReshardConfig, RunConfig
from mlcd_ds.data.tars import write_tar
from mlcd_ds.data.tokenizer import train_tokenizer
from mlcd_ds.engine import to_universal
from mlcd_ds.errors import CheckpointError
from mlcd_ds.losses import clip_loss
from mlcd_ds.topology import Topology

WORDS = ("red", "blue", "green", "dark", "bright")
STEPS = 6


def caption(index: int) -> str:
    return f"a {WORDS[index % 5]} picture, number {index}"


def write_captioned(folder, counts=(40, 41)):
    """Tars of pictures with captions, one in KEY.json, one missing and one that is no text in the first."""
    for shard, count in enumerate(counts):
        samples = []
        for row in range(count):
            text = {"txt": caption(row).encode()}
            if shard == 0 and row < 3:
                text = ({"json": json.dumps({"caption": caption(0)}).encode()}, {}, {"txt": b"\xff\xff"})[row]
            samples.append((f"{shard:05d}{row:04d}", {"jpg": picture(shard * 1000 + row), **text}))
        write_tar(folder / f"{shard:05d}.tar", samples)


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """The worker's folder: engine*.pt of the engine alone, run folders of train.py, how each of its ranks ended."""
    folder = tmp_path_factory.mktemp("captions")
    write_captioned(folder / "tars")
    train_tokenizer([caption(row) for row in range(41)], 600, folder / "tokenizer.json")
    config = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 12,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "eps": 1e-4, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000},
        "tensorboard": {"enabled": True},
    }
    (folder / "ds.json").write_text(json.dumps(config))

    def run(name, world_size, stop=None, **changes):
        values = {
            "deepspeed_config": folder / "ds.json", "objective": "clip", "shards": folder / "tars" / "{00000..00001}.tar",
            "tokenizer": folder / "tokenizer.json", "model": "vit_toy", "text_model": "text_toy", "steps": STEPS,
            "output_dir": folder / name.split()[0], "workers": 0, "save_every_steps": 3, "log_every_steps": 1,
            "max_skipped_fraction": 0.1, "timeout_minutes": 1,
        } | changes  # fmt: skip
        flags = [f"--{flag}={value}" for flag, value in values.items()]
        return {"name": name, "world_size": world_size, "flags": flags, "stop": stop}

    runs = [
        run("whole", 2),
        run("killed", 2, stop=4),
        run("killed again", 2, resume="auto"),
        run("other", 2, stop=4),
        run("other again", 1, resume="auto"),
        run("lit", 2, stop=2, init_from=folder / "whole", lock_image="true", save_every_steps=1, steps=3),
        run("lit again", 1, init_from=folder / "whole", lock_image="true", steps=3, resume="auto"),
        run("few", 1, max_skipped_fraction=0.01),
    ]
    (folder / "runs.json").write_text(json.dumps(runs))
    (ended,) = run_script(1, [ROOT / "tests" / "contrastive_worker.py", folder], timeout=600)
    assert ended.code == 0, ended.output[-5000:]
    return folder


def ended(worked, name, rank=0):
    return json.loads((worked / f"{name}.{rank}.json").read_text())


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- the engine alone


def definition(locked):
    """Loss, gradients of all parameters, of the whole batch in one float64 process."""
    model, batch = towers(locked).double(), pairs()
    pixels = batch.images_BCHH
    images, texts, scale = model(pixels, batch.labels_BL.clamp_min(0))
    loss = clip_loss(images, texts, scale, batch.labels_BL[:, 0] != NO_IMAGE)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("world_size", COMBINATIONS)
def test_gradients_that_reach_both_towers_are_the_definitions(worked, world_size):
    """At every ZeRO stage, with and without accumulation, which changes nothing: the contrast is among the whole batch."""
    for stage, accumulation, locked in COMBINATIONS[world_size]:
        loss, gradients = definition(locked)
        for rank in range(world_size):
            everything = torch.load(worked / f"engine{world_size}_rank{rank}.pt", weights_only=True)
            found = everything[str((stage, accumulation, locked))]
            assert found["loss"] == pytest.approx(loss, rel=1e-5)
            assert found["gradients"].keys() == gradients.keys()
            assert found["stop_ranks"] == 1 and found["stats"]["logit_scale"].item() == pytest.approx(1 / 0.07)
            for name, gradient in gradients.items():
                difference = (found["gradients"][name].double() - gradient).norm() / gradient.norm()
                assert difference < 2e-4, (stage, accumulation, locked, name, difference)
            if locked:
                assert not found["image_gradients"]
                assert all(name.startswith("text.") or name == "log_scale" for name in gradients)
    assert len(MISSING) == 2


def test_a_bad_step_moves_nothing_and_names_the_rank(worked):
    everything = torch.load(worked / "engine2_rank0.pt", weights_only=True)
    for combination in ((0, 1, False), (3, 3, False)):
        found = everything[f"bad {combination}"]
        assert not found["applied"] and not found["moved"] and found["bad"] == ("embeddings", (1,))


@pytest.mark.parametrize("name", ["both", "locked"])
def test_a_checkpoint_goes_on_at_another_number_of_ranks_and_stage(worked, name):
    first = torch.load(worked / "engine2_rank0.pt", weights_only=True)[f"{name} 0"]
    second = torch.load(worked / "engine1_rank0.pt", weights_only=True)[f"{name} 1"]
    assert first["saved"].keys() == second["loaded"].keys() == dict(towers(False).named_parameters()).keys()
    for parameter, tensor in first["saved"].items():
        assert torch.equal(second["loaded"][parameter], tensor), parameter
    assert second["losses"][0] == pytest.approx(first["losses"][1], rel=1e-5)
    initial = towers(False).state_dict()
    moved = [parameter for parameter, x in first["saved"].items() if not torch.equal(x, initial[parameter])]
    assert any(x.startswith("image.") for x in moved) == (name == "both") and "log_scale" in moved


def test_bfloat16_takes_the_same_steps_roughly(worked):
    everything = torch.load(worked / "engine2_rank0.pt", weights_only=True)
    for locked in (False, True):
        found, (loss, _) = everything[f"bf16 {locked}"], definition(locked)
        assert found["losses"][0] == pytest.approx(loss, rel=2e-2) and found["applied"] == [True, True]
        assert {"log_scale", "text.projection.weight"} <= set(found["moved"])
        assert any(name.startswith("image.") for name in found["moved"]) != locked


def test_a_locked_tower_is_saved_as_it_came_though_the_engine_rounds_it(worked):
    saved = load_file(worked / "bf16" / "encoder" / "encoder.safetensors")
    expected = towers(True).image.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


# ---------------------------------------------------------------------------------------------- train.py


def test_it_trains_and_shows_what_it_does(worked):
    run, output = worked / "whole", ended(worked, "whole")["output"]
    assert ended(worked, "whole")["code"] == 0, output[-3000:]
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # Two passes over the same images, three steps each: single steps differ by their images more than by what is learnt.
    losses = [line["train_loss"] for line in lines]
    assert sum(losses[3:]) < sum(losses[:3])
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    for name in ("logit_scale", "accuracy_image_to_text", "accuracy_text_to_image", "cosine_positive", "grad_norm"):
        assert all(name in line for line in lines)
    assert "lr_head" not in lines[0] and not (run / "checkpoints" / "step_000000006" / "head").exists()
    assert "24 images against their captions; both towers learn" in output and "text_toy, 32 tokens of" in output
    assert "scale 14.3" in output and "images have no caption: they are skipped" in output
    facts = json.loads((run / "config.json").read_text())
    assert facts["facts"]["tokenizer_hash"] and facts["text"]["context"] == 32


def test_images_without_a_caption_are_skipped_and_counted(worked):
    last = metrics(worked / "whole")[-1]
    assert last["samples_skipped_no_caption"] > 0 and last["samples_skipped_bad_caption"] > 0
    assert last["samples_decoded"] + last["samples_skipped"] == 24 * STEPS
    names = "".join(path.read_text() for path in (worked / "whole" / "skipped").glob("rank_*.txt"))
    assert (
        "000000001: no_caption: its tar has neither KEY.txt nor KEY.json" in names and "000000002: bad_caption" in names
    )
    few = ended(worked, "few")
    assert few["code"] == 3 and "1 of 81 images have no caption" in few["output"], few["output"][-2000:]


def test_a_killed_run_resumes_bit_for_bit(worked):
    assert ended(worked, "killed")["code"] == 9 and ended(worked, "killed again")["code"] == 0
    whole, again = (worked / name / "checkpoints" / "step_000000006" for name in ("whole", "killed"))
    for file in ("encoder/encoder.safetensors", "text/text.safetensors", "text/tokenizer.json", "text/text.json"):
        assert (whole / file).read_bytes() == (again / file).read_bytes(), file
    engine = sorted(path.name for path in (whole / "engine").iterdir())
    assert engine == sorted(path.name for path in (again / "engine").iterdir())
    timed = ("time", "samples_per_second", "mfu", "data_wait_fraction", "memory_gb")
    kept = [
        [{name: v for name, v in line.items() if name not in timed} for line in metrics(worked / name)]
        for name in ("whole", "killed")
    ]
    assert kept[0] == kept[1]


def test_one_rank_goes_on_where_two_were_killed_and_computes_the_same(worked):
    """With two micro-batches in place of two ranks: the contrast stays among the whole batch."""
    assert ended(worked, "other again")["code"] == 0, ended(worked, "other again")["output"][-3000:]
    assert "each image and text embedded twice" in ended(worked, "other again")["output"]
    whole, other = metrics(worked / "whole"), metrics(worked / "other")
    assert [line["train_loss"] for line in other] == pytest.approx([line["train_loss"] for line in whole], rel=1e-4)
    images = []
    for name, ranks in (("whole", 2), ("other again", 1)):
        steps = [step for rank in range(ranks) for step in ended(worked, name, rank)["steps"]]
        images.append(sorted(tuple(image) for step, some in steps if step == 5 for image in some))
    assert images[0] == images[1] and len(images[0]) == 24


def test_a_locked_image_tower_stays_to_the_bit_and_the_text_tower_learns(worked):
    assert ended(worked, "lit again")["code"] == 0, ended(worked, "lit again")["output"][-3000:]
    assert "stays as" in ended(worked, "lit")["output"]
    image = load_file(worked / "whole/checkpoints/step_000000006/encoder/encoder.safetensors")
    texts = []
    for step in (1, 3):
        folder = worked / f"lit/checkpoints/step_{step:09d}"
        locked = load_file(folder / "encoder" / "encoder.safetensors")
        assert all(torch.equal(locked[name], image[name]) for name in image)
        texts.append(load_file(folder / "text" / "text.safetensors"))
    assert all(not torch.equal(texts[0][name], texts[1][name]) for name in ("log_scale", "embeddings.tokens.weight"))


def test_every_tool_finds_the_towers(worked, tmp_path):
    text = checkpoint.load_text(worked / "lit")
    assert (text.name, text.model.config.embed_dim, text.log_scale.shape) == ("text_toy", 128, (1,))
    assert text.tokenizer.encode(caption(3), 32)[0] == text.tokenizer.vocabulary - 2
    assert checkpoint.load_encoder(worked / "lit").config.image_size == 32
    checkpoint_tools.consolidate(ConsolidateConfig(path=str(worked / "lit"), output_dir=str(tmp_path / "weights")))
    resharding = ReshardConfig(path=str(worked / "lit"), output_dir=str(tmp_path / "one"), world_size=3)
    checkpoint_tools.reshard(resharding, to_universal)
    for other in ("weights", "one"):
        again = checkpoint.load_text(tmp_path / other)
        assert again.digest == text.digest and again.tokenizer.hash == text.tokenizer.hash
        assert checkpoint.has_text(tmp_path / other)
    shutil.copytree(worked / "whole/checkpoints/step_000000006/encoder", tmp_path / "image_only/encoder")
    with pytest.raises(CheckpointError, match="has no text tower: its run was trained on labels"):
        checkpoint.load_text(tmp_path / "image_only")


def test_dry_run_counts_the_images_of_the_tars(worked, capsys):
    from mlcd_ds.train import dry_run

    config = RunConfig(
        deepspeed_config=str(worked / "ds.json"), objective="clip", shards=str(worked / "tars" / "*.tar"), model="vit_toy",
        tokenizer=str(worked / "tokenizer.json"), text_model="text_toy", output_dir=str(worked / "dry"), epochs=2,
        dry_run=True, world_size=2,
    )  # fmt: skip
    dry_run(config, Topology.single())
    card = capsys.readouterr().out
    assert "81 images in 2 shards" in card and "text_toy, 32 tokens" in card and not (worked / "dry").exists()
