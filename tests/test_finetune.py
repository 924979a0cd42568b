"""Fine-tuning: mixing, targets, layer-wise learning rates; the tool on one rank, resumed, and on two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factory import picture
from processes import ROOT, run_script
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mlcd_ds.averaging import WeightAverage
from mlcd_ds.batch import NO_IMAGE
from mlcd_ds.checkpoint import load_encoder, save_encoder
from mlcd_ds.config import FinetuneConfig
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import CheckpointError, DataError
from mlcd_ds.evaluation.results import read_results
from mlcd_ds.finetune import TestImages, make_class_labels
from mlcd_ds.finetune_engine import mix, soft_cross_entropy, targets_of
from mlcd_ds.models.classifier import Classifier, layer_groups
from mlcd_ds.models.vit import VisionTransformer, VitConfig
from mlcd_ds.topology import Topology

CLASSES = 6


def tiny(rope: bool = False) -> VitConfig:
    shape = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 16, "heads": 2, "mlp_width": 32, "embed_dim": 8}
    return VitConfig(**shape, rope=rope, activation="gelu", norm_eps=1e-5)


def settings(**more) -> FinetuneConfig:
    needed = dict.fromkeys(("deepspeed_config", "shards", "test_shards", "output_dir", "init_from"), "x")
    return FinetuneConfig(**needed | more)


# --- mathematics


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_cross_entropy_is_torchs(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 5, generator=generator), torch.tensor([0, 4, NO_IMAGE, 2, 2, 1, 3])
    targets = targets_of(labels, 5)
    known = labels != NO_IMAGE
    expected = F.cross_entropy(logits[known], labels[known], label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(soft_cross_entropy(logits, targets, smoothing), expected)
    mixed = 0.3 * targets[known] + 0.7 * targets[known].flip(0)
    expected = F.cross_entropy(logits[known], mixed, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(soft_cross_entropy(logits[known], mixed, smoothing), expected)


def mixed_batches(**flags):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(4)
    for seed in range(40):
        yield images, *mix(images, targets, settings(**flags), np.random.default_rng(seed))


def test_mixup_is_a_mean_of_two_images_by_their_targets():
    for images, mixed, targets in mixed_batches(cutmix=0):
        assert mixed.dtype == torch.uint8
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        lam = targets.diagonal()[:, None, None, None]
        assert (mixed.float() - (lam * images + (1 - lam) * images.flip(0).float())).abs().max() <= 0.501


def test_cutmix_takes_a_rectangle_and_its_share_of_the_target():
    shares = []
    for images, mixed, targets in mixed_batches(mixup=0):
        other = (mixed != images).any(1)
        assert ((mixed == images) | (mixed == images.flip(0))).all()
        rows, columns = other.any(0).any(1).sum(), other.any(0).any(0).sum()
        torch.testing.assert_close(1 - targets.diagonal(), (rows * columns / 256.0).expand(4))
        shares.append(float(rows * columns) / 256)
    assert 0.1 < np.mean(shares) < 0.6 and len(set(shares)) > 10


def test_both_take_turns_and_neither_leaves_all_as_it_is():
    kinds = {"none": 0, "rectangle": 0, "mean": 0}
    for images, mixed, _ in mixed_batches(mix_probability=0.5):
        own = (mixed == images).all()
        kinds["none" if own else "rectangle" if ((mixed == images) | (mixed == images.flip(0))).all() else "mean"] += 1
    assert min(kinds.values()) >= 4, kinds
    for images, mixed, targets in mixed_batches(mixup=0, cutmix=0):
        assert mixed is images and torch.equal(targets, torch.eye(4))


@pytest.mark.parametrize("rope", [False, True])
def test_learning_rates_fall_with_depth(rope):
    model = Classifier(VisionTransformer(tiny(rope), seed=0), CLASSES, seed=0)
    groups = layer_groups(model, 0.05, 1e-3, 0.5)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {name_of[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(rates) == set(name_of.values()) - {"encoder.projection.weight"}
    assert groups[0]["lr"] == 1e-3  # the one that is reported
    assert rates["head.weight"] == (1e-3, 0.05) and rates["head.bias"] == rates["encoder.norm_post.weight"] == (
        1e-3,
        0.0,
    )
    assert rates["encoder.blocks.1.fc1.weight"] == (5e-4, 0.05) and rates["encoder.blocks.0.norm1.bias"] == (
        2.5e-4,
        0.0,
    )
    assert rates["encoder.embeddings.patch.weight"] == (1.25e-4, 0.05)
    assert rates["encoder.embeddings.class_token"] == rates["encoder.norm_pre.weight"] == (1.25e-4, 0.0)
    assert len({group["lr"] for group in layer_groups(model, 0.05, 1e-3, 1.0)}) == 1


# --- data


def write_images(folder: Path, split: str, count: int, classes=lambda i: str(i % CLASSES)) -> str:
    for shard in range(2):
        rows = range(shard, count, 2)
        samples = [
            (f"s{i:04d}", {"png": picture(i % CLASSES * 7 + i % 2, 20), "cls": classes(i).encode()}) for i in rows
        ]
        write_tar(folder / split / f"{shard}.tar", samples)
    return f"{folder / split}/*.tar"


def test_classes_that_cannot_be_used(tmp_path):
    def labels(**more):
        config = settings(shards="x", **more)
        shards = sorted(str(path) for path in (tmp_path / "train").glob("*.tar"))
        return make_class_labels(config, shards, tmp_path / "labels", Topology.single())

    write_images(tmp_path, "train", 12)
    assert labels() == CLASSES and labels(num_classes=9) == 9
    with pytest.raises(DataError, match="of class 5, --num_classes is 4"):
        labels(num_classes=4)
    write_images(tmp_path, "train", 12, lambda i: "1 2" if i == 4 else "1")
    with pytest.raises(
        DataError, match=r"0\.tar: image s0004 has the classes \[1, 2\]: fine-tuning wants one an image"
    ):
        labels()


# --- the tool


JSON = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": 0.05, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"},
    },
    "zero_optimization": {"stage": 1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One start of DeepSpeed: a run of 24 steps; the same resumed from its 12th; the same on two ranks at ZeRO 3; its
    12th step resharded, and gone on with by two ranks."""
    base = tmp_path_factory.mktemp("finetune")
    train, test = write_images(base, "train", 48), write_images(base, "test", 13)
    model = VisionTransformer(tiny(), seed=3)
    save_encoder(base / "start", "tiny", tiny(), model.state_dict())
    (base / "one.json").write_text(json.dumps(JSON))
    (base / "three.json").write_text(json.dumps(JSON | {"zero_optimization": {"stage": 3}}))

    def flags(config: str, output: str):
        wanted = {"deepspeed_config": base / config, "init_from": base / "start", "shards": train, "test_shards": test}
        wanted |= {"output_dir": base / output, "epochs": 4, "save_every_steps": 12, "log_every_steps": 6, "workers": 0}
        wanted |= {
            "layer_decay": 0.8,
            "crop_scale_min": 0.5,
            "dataset_name": "colours",
            "mix_probability": 0.4,
            "image_size": 24,
            "drop_path": 0.2,
            "ema_decay": 0.8,
            "resume": "auto",
        }
        return [f"--{name}={value}" for name, value in wanted.items()]

    one = {"name": "one", "world_size": 1, "tool": "finetune.py", "flags": flags("one.json", "run")}
    again = one | {"name": "again", "remove": str(base / "run/checkpoints/step_000000024")}
    two = one | {"name": "two", "world_size": 2, "flags": flags("three.json", "two")}
    resharded = {"path": base / "run/checkpoints/step_000000012", "world_size": 2, "output_dir": base / "parts"}
    reshard = {"name": "reshard", "world_size": 1, "tool": "checkpoint.py"}
    reshard["flags"] = ["reshard", *(f"--{name}={value}" for name, value in resharded.items())]
    parts = two | {"name": "parts", "flags": flags("one.json", "parts")}
    keeping = [kept(base, "run", "first"), kept(base, "run/average", "first_average")]
    (base / "runs.json").write_text(json.dumps([one, *keeping, reshard, again, two, parts]))
    (ended,) = run_script(1, [ROOT / "tests" / "forked_runs.py", base], timeout=300)
    assert ended.code == 0, ended.output[-3000:]
    found = {
        run["name"]: json.loads((base / f"{run['name']}.0.json").read_text())
        for run in (one, reshard, again, two, parts)
    }
    for name, run in found.items():
        assert run["code"] == 0, (name, run["output"][-3000:])
    return base, found


def kept(base: Path, encoder: str, output: str) -> dict:
    """A copy of an encoder of the first run, for transformers."""
    flags = [f"--run={base / encoder}", f"--output_dir={base / output}"]
    return {"name": output, "world_size": 1, "tool": "export_hf.py", "flags": flags}


def weights(base: Path, run: str, part: str = "") -> dict[str, torch.Tensor]:
    folder = base / run / "checkpoints/step_000000024" / part
    return load_file(folder / "encoder/encoder.safetensors") | load_file(folder / "classifier.safetensors")


def test_it_learns_and_tells(runs):
    base, found = runs
    output = found["one"]["output"]
    assert "x 0.8 a block down to x 0.512" in output and "tiny at 24 px, 6 classes" in output
    assert output.count("on 13 test images") == 8  # of 4 epochs, as trained and averaged
    assert "drop path      0.2 in the last block" in output and "the last 5 steps make most of it" in output
    assert "right " in output and "of mixed images" in output
    found = {result.pretrained: result for result in read_results(base / "run/results").values()}
    assert set(found) == {f"run:{base / 'run'}", f"run:{base / 'run/average'}"}
    result = found[f"run:{base / 'run'}"]
    assert (result.dataset, result.model, result.task, result.details["step"]) == ("colours", "tiny", "finetune", 24)
    assert result.metrics["acc1"] > 0.3 and result.metrics["acc5"] >= result.metrics["acc1"]  # chance: 0.17 and 0.83
    lines = [json.loads(line) for line in (base / "run/metrics.jsonl").read_text().splitlines()]
    assert any("test_acc1" in line and "test_acc1_average" in line for line in lines)
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert losses[-1] < losses[0] - 0.2
    start, end = load_encoder(base / "start").state_dict(), load_encoder(base / "run").state_dict()
    assert torch.equal(start["projection.weight"], end["projection.weight"])
    assert not torch.equal(start["blocks.0.fc1.weight"], end["blocks.0.fc1.weight"])
    assert len(end["embeddings.positions"]) == 10  # 24 pixels


def test_resumed_it_is_the_same(runs):
    base, found = runs
    assert "resumed from" in found["again"]["output"] and "at step 12/24" in found["again"]["output"]
    assert last_line(found["one"]) == last_line(found["again"])
    for first, now in (("first", "run"), ("first_average", "run/average")):
        before, after = (load_encoder(path).state_dict() for path in (f"hf:{base / first}", base / now))
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_the_average_lies_between_where_the_weights_began_and_where_they_are(runs):
    base, _ = runs
    begun, trained, averaged = (
        load_encoder(base / "start").state_dict(),
        weights(base, "run"),
        weights(base, "run", "average"),
    )
    assert set(averaged) == set(trained) and torch.equal(averaged["projection.weight"], trained["projection.weight"])
    for name in ("blocks.0.fc1.weight", "blocks.1.attention.out.weight", "embeddings.patch.weight"):
        way, left = (averaged[name] - begun[name]).norm(), (trained[name] - averaged[name]).norm()
        assert 0 < left < 0.7 * (trained[name] - begun[name]).norm() and way > left


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_average_is_its_definition_and_loads_at_any_number_of_ranks(ranks, tmp_path):
    steps = [{"a.x": torch.randn(3, 4), "a.y": torch.randn(2), "b.z": torch.randn(1)} for _ in range(5)]
    shapes = {name: weight.shape for name, weight in steps[0].items()}

    def pieces(weights, topology):
        found = {}
        for name, weight in weights.items():
            flat, of = weight.view(-1), topology.world_size
            start, stop = len(flat) * topology.rank // of, len(flat) * (topology.rank + 1) // of
            found |= {name: (start, flat[start:stop])} if stop > start else {}
        return found

    def run(topology):
        average = WeightAverage(0.7, pieces(steps[0], topology), shapes)
        for weights in steps[1:]:
            average.update(pieces(weights, topology))
        whole = average.whole(topology)
        if topology.is_main:
            save_file({"x": whole["a.x"], "y": whole["a.y"]}, tmp_path / "a.safetensors")
            save_file({"z": whole["b.z"]}, tmp_path / "b.safetensors")
        return whole

    expected = steps[0]
    for weights in steps[1:]:
        expected = {name: 0.7 * expected[name].double() + 0.3 * weight for name, weight in weights.items()}
    for whole in run_ranks(ranks, run):
        for name, values in expected.items():
            torch.testing.assert_close(whole[name].double(), values, rtol=1e-6, atol=1e-6)

    def again(topology):
        average = WeightAverage(0.7, pieces(steps[0], topology), shapes)
        average.load({tmp_path / "a.safetensors": "a.", tmp_path / "b.safetensors": "b."})
        with pytest.raises(CheckpointError, match="a.safetensors lack the average of b.z"):
            WeightAverage(0.7, {"b.z": (0, torch.zeros(1))}, shapes).load({tmp_path / "a.safetensors": "a."})
        return average.whole(topology)

    for read in run_ranks(5 - ranks, again):
        assert all(torch.equal(read[name], whole[name]) for name in shapes)


def last_line(run: dict) -> str:
    """What it told of the last epoch."""
    return next(line for line in run["output"].splitlines() if line.startswith("epoch 4.00")).split(";")[0]


@pytest.mark.parametrize("part", ["", "average"])
@pytest.mark.parametrize("other", ["two", "parts"])
def test_two_ranks_compute_the_same_at_stage_3_and_from_a_resharded_checkpoint(runs, other, part):
    base, found = runs
    assert f"2 on cpu, float32, ZeRO stage {3 if other == 'two' else 1}" in found[other]["output"]
    assert ("at step 12/24" in found[other]["output"]) == (other == "parts")
    one, two = weights(base, "run", part), weights(base, other, part)
    start = load_encoder(base / "start").state_dict()
    assert set(one) == set(two)
    for name in one:
        if name.endswith("attention.qkv.bias"):  # softmax does not see the keys' bias: its gradient is rounding alone
            one[name], two[name] = (torch.cat([w[name][:16], w[name][32:]]) for w in (one, two))
            start[name] = torch.cat([start[name][:16], start[name][32:]])
        moved = (
            (one[name] - start[name]).abs().max() if start.get(name, one[name][:0]).shape == one[name].shape else 1.0
        )
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=float(0.02 * moved) + 1e-6, msg=name)
    assert last_line(found["one"]) == last_line(found[other])


def test_test_images_are_shared_out_once(tmp_path):
    test = write_images(tmp_path, "test", 13)
    shards = sorted(str(path) for path in (tmp_path / "test").glob("*.tar"))
    config = settings(test_shards=test)
    keys = []
    for rank in range(3):
        topology = Topology(rank, 3, rank, 3, torch.device("cpu"))
        keys += [key for key, _ in TestImages(config, shards, topology)._own()]
    assert sorted(keys) == [f"s{i:04d}" for i in range(13)]
