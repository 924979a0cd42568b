"""The main job end to end: it trains on two ranks, resumes bit for bit after a kill, and names what is wrong."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_factory import make_labels, make_shards, picture
from processes import ROOT, free_port, run_script, start_ranks, wait_ranks
from safetensors.torch import load_file
from test_vit import images, scrambled

from mlcd_ds import train
from mlcd_ds.batch import NO_LABEL
from mlcd_ds.checkpoint import encoder_config, find_encoder, published, save_encoder, verify
from mlcd_ds.config import RunConfig
from mlcd_ds.data.labels import LabelsInfo
from mlcd_ds.data.tars import write_tar
from mlcd_ds.ds_config import BatchSizes, load_deepspeed_config
from mlcd_ds.errors import CheckpointError
from mlcd_ds.files import sha256
from mlcd_ds.models import flops, hf
from mlcd_ds.models.vit import PRESETS, Dropping, preset
from mlcd_ds.partial_fc import random_rows
from mlcd_ds.profiling import BACKWARD, COMMUNICATION, FORWARD, HEAD, OPTIMIZER, PHASES, mean_of_ranks
from mlcd_ds.run_folder import RunFolder
from mlcd_ds.topology import Topology
from mlcd_ds.train import RunPlan, build_head

TRAIN = ROOT / "mlcd_ds" / "train.py"
STEPS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tars, labels and a JSON for two ranks; 123 images, 24 a step: epochs end within steps."""
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder / "tars")
    make_labels(folder / "labels")
    json_file = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 12,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"},
        },
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000},
        "activation_checkpointing": {},
        "tensorboard": {"enabled": True},
    }
    (folder / "ds.json").write_text(json.dumps(json_file))
    return folder


def flags(data: Path, run: Path, **changes) -> list[str]:
    values = {
        "deepspeed_config": data / "ds.json",
        "shards": data / "tars" / "{00000..00002}.tar",
        "labels": data / "labels",
        "model": "vit_toy",
        "output_dir": run,
        "steps": STEPS,
        "workers": 1,
        "save_every_steps": 3,
        "log_every_steps": 1,
        "histogram_every_steps": 3,
        "sample_rate": 0.3,
        "timeout_minutes": 1,
        "drop_path": 0.1,
        "patch_dropout": 0.1,
        "profile_steps": "4-5",
        "peak_tflops": 1,
    } | changes
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """A run never interrupted, started by the launcher as users do."""
    run = tmp_path_factory.mktemp("whole") / "run"
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", "2", "--master_port", str(free_port()), TRAIN]
    command += flags(data, run, peak_tflops=None)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{launcher.parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run, done.stdout


def test_it_trains(whole_run):
    run, output = whole_run
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["train_loss"] < 0.9 * lines[0]["train_loss"]
    assert json.loads((run / "status.json").read_text()) == {
        "state": "done",
        "step": STEPS,
        "saved": STEPS,
        "reason": "",
    }
    for words in (
        "global batch",
        "24 images = 12 a micro-batch x 1 accumulated x 2 ranks",
        "step 9/9",
        "done: 9 steps",
    ):
        assert words in output


def test_both_ranks_rows_are_in_the_checkpoint(whole_run):
    run, _ = whole_run
    checkpoints = published(run / "checkpoints")
    assert [path.name for path in checkpoints] == ["step_000000003", "step_000000006", "step_000000009"]
    for path in checkpoints:
        verify(path)
    rows = sorted(path.name for path in (checkpoints[-1] / "head").iterdir())
    assert rows == ["rows_0000000000_0000000025.safetensors", "rows_0000000025_0000000050.safetensors"]
    first, second = (load_file(checkpoints[-1] / "head" / name) for name in rows)
    assert first["centers"].shape == second["centers"].shape == (25, 128)
    assert not torch.equal(first["centers"], second["centers"])


def test_monitor_has_the_tags(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = whole_run
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    wanted = (
        "train_loss loss_positive loss_negative lr_encoder lr_head grad_norm head_grad_norm cosine_positive cosine_negative "
        "samples_per_second mfu data_wait_fraction memory_gb sampled_rows positive_rows skipped_steps"
    )
    for name in wanted.split():
        points = events.Scalars(f"Train/Samples/{name}")
        assert [point.step for point in points] == [24 * step for step in range(1, STEPS + 1)], name
    losses = [point.value for point in events.Scalars("Train/Samples/train_loss")]
    assert losses == pytest.approx([line["train_loss"] for line in metrics(run)])
    for name in ("cosine_histogram_positive", "cosine_histogram_negative"):
        histograms = events.Histograms(f"Train/Samples/{name}")
        assert [entry.step for entry in histograms] == [72, 144, 216]
        assert histograms[0].histogram_value.num > 0


def test_profiled_steps_leave_a_trace_of_each_rank_and_a_table(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, output = whole_run
    profile = json.loads((run / "profile" / "steps.json").read_text())
    assert (profile["first"], profile["last"]) == (4, 5)
    for rank, seconds in enumerate(profile["seconds_of_ranks"]):
        assert set(seconds) == {*PHASES, COMMUNICATION}
        whole = sum(seconds[name] for name in PHASES)
        assert min(seconds[name] for name in (FORWARD, HEAD, BACKWARD, OPTIMIZER)) > 0 < seconds[COMMUNICATION] < whole
        events = json.loads(gzip.decompress((run / "profile" / f"trace_rank{rank}.json.gz").read_bytes()))[
            "traceEvents"
        ]
        names = Counter(event.get("name") for event in events if event.get("cat") == "user_annotation")
        assert names[FORWARD] == names[BACKWARD] == 2 and names[HEAD] > 2
    assert "profile of steps 4-5, 2 ranks, a step" in output and "communication (within these)" in output
    tensorboard = EventAccumulator(str(run / "tensorboard")).Reload()
    (point,) = tensorboard.Scalars("Profile/encoder_forward_ms")
    assert point.step == 5 * 24
    assert point.value == pytest.approx(1e3 * mean_of_ranks(profile["seconds_of_ranks"])[FORWARD], rel=1e-5)
    assert "Profile/steps/text_summary" in tensorboard.Tags()["tensors"]


def test_mfu_is_the_share_of_the_measured_rate(whole_run):
    """images/s x FLOPs of an image / (ranks x rate), with the rate that the run says it has measured."""
    run, output = whole_run
    rate, work = map(
        float, re.search(r"MFU is the share of (\S+) TFLOP/s a rank .* takes (\S+) GFLOP", output).groups()
    )
    expected = flops.total(PRESETS["vit_toy"], Dropping(0, patch_dropout=0.1)).flops
    assert work * 1e9 == pytest.approx(expected, rel=1e-3)
    for line in metrics(run):
        assert line["mfu"] == pytest.approx(line["samples_per_second"] * expected / (2 * rate * 1e12), rel=1e-2)


def comparable(line: dict) -> dict:
    changing = "time samples_per_second mfu data_wait_fraction memory_gb samples_decoded samples_skipped".split()
    return {name: value for name, value in line.items() if name not in changing}


def wait_for_step(run: Path, step: int, started) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        assert all(process.poll() is None for process, _ in started), [log.read_text()[-2000:] for _, log in started]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_run_resumes_bit_for_bit(data, whole_run, tmp_path, victim):
    run = tmp_path / "run"
    started = start_ranks(2, [TRAIN, *flags(data, run)])
    wait_for_step(run, 5, started)
    os.kill(started[victim][0].pid, signal.SIGKILL)
    ended = wait_ranks(started, timeout=90)
    assert all(rank.code != 0 for rank in ended)
    # The survivor sees its peer's connection break and says so.
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    # What a kill in the middle of a write leaves behind: a cut line, a half-written checkpoint.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "sam')
    shutil.copytree(published(run / "checkpoints")[-1], run / "checkpoints" / "step_000000007.tmp")

    ended = run_script(2, [TRAIN, *flags(data, run, resume="auto")])
    assert [rank.code for rank in ended] == [0, 0], ended[0].output[-3000:]
    assert "resumed from" in ended[0].output
    whole, _ = whole_run
    assert [comparable(line) for line in metrics(run)] == [comparable(line) for line in metrics(whole)]
    last, whole_last = published(run / "checkpoints")[-1], published(whole / "checkpoints")[-1]
    for path in sorted(whole_last.rglob("*.safetensors")):
        ours, theirs = load_file(last / path.relative_to(whole_last)), load_file(path)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (path, name)


@pytest.fixture
def two_heads(data):
    """Flags of a run with a second folder of labels, of the same tars by fewer centers."""
    make_labels(data / "labels_text", k=31, centers_hash="text")
    return {"labels": f"{data / 'labels'}::{data / 'labels_text'}", "head_weights": "1,0.5", "positives_drawn": 3}


def test_two_heads_train_and_resume_bit_for_bit(data, two_heads, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole, run = tmp_path / "whole", tmp_path / "run"
    ended = run_script(2, [TRAIN, *flags(data, whole, **two_heads)])
    assert [rank.code for rank in ended] == [0, 0], ended[0].output[-3000:]
    for words in ("head 0", "31 classes, l=8 (3 drawn at each visit)", "loss x 0.5", "| head 1 loss "):
        assert words in ended[0].output
    lines = metrics(whole)
    for line in lines:
        parts = [line[f"loss_positive{suffix}"] + line[f"loss_negative{suffix}"] for suffix in ("", "_1")]
        assert line["train_loss"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)
        assert line["head_grad_norm"] > 0 and line["head_grad_norm_1"] > 0
    for name in ("loss_positive", "loss_positive_1"):
        assert lines[-1][name] < lines[0][name]
    events = EventAccumulator(str(whole / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    assert [point.step for point in events.Histograms("Train/Samples/cosine_histogram_positive_1")] == [72, 144, 216]
    assert len(events.Scalars("Train/Samples/cosine_negative_1")) == STEPS
    facts = json.loads((whole / "config.json").read_text())["facts"]
    assert facts["num_classes"] == [50, 31] and facts["centers_hash"] == ["c0ffee", "text"]

    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_000000009")
    ended = run_script(2, [TRAIN, *flags(data, run, **two_heads, resume="auto")])
    assert [rank.code for rank in ended] == [0, 0], ended[0].output[-3000:]
    assert f"resumed from {run / 'checkpoints' / 'step_000000006'}" in ended[0].output
    assert [comparable(line) for line in metrics(run)] == [comparable(line) for line in lines]
    last, whole_last = published(run / "checkpoints")[-1], published(whole / "checkpoints")[-1]
    files = sorted(path.relative_to(whole_last) for path in whole_last.rglob("*.safetensors"))
    assert sum(path.parent.name == "head" for path in files) == sum(path.parent.name == "head_1" for path in files) == 2
    for path in files:
        ours, theirs = load_file(last / path), load_file(whole_last / path)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (path, name)
    changed = two_heads | {"head_weights": "1,1"}
    refused(
        run_script(2, [TRAIN, *flags(data, run, **changed, resume="auto")]),
        4,
        "head_weights: [1.0, 0.5] then, [1.0, 1.0]",
    )


def test_each_head_starts_from_its_own_seed_or_centers(tmp_path):
    """Two heads of one size: else they would draw the same rows and start alike."""
    labels = tuple(LabelsInfo(40, 8, name, "random") for name in ("a", "b"))
    settings = SimpleNamespace(precision="float32")
    plan = RunPlan(settings, preset("vit_toy"), length=None, labels=labels, world_size=1, card="")
    for name, seed in (("a", 1), ("b", 2)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).random((40, 128), np.float32))

    def heads(**changes):
        given = {"deepspeed_config": "x", "shards": "x", "labels": "a::b", "output_dir": "x", "seed": 5} | changes
        return [build_head(RunConfig(**given), plan, Topology.single(), True, index) for index in (0, 1)]

    first, second = heads()
    assert torch.equal(first.centers, random_rows(0, 40, 40, 128, seed=5))  # that of a run with one head
    assert torch.equal(second.centers, random_rows(0, 40, 40, 128, seed=6))
    nothing = torch.full((1, 8), NO_LABEL)
    assert not torch.equal(first.sampler.draw(nothing, 0), second.sampler.draw(nothing, 0))
    for head, name in zip(heads(centers=f"{tmp_path / 'a.npy'}::{tmp_path / 'b.npy'}"), "ab", strict=True):
        assert torch.equal(head.centers, torch.from_numpy(np.load(tmp_path / f"{name}.npy")))


def test_resumed_run_leaves_no_point_twice_in_tensorboard(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    started = start_ranks(1, [TRAIN, *flags(data, run)])
    wait_for_step(run, 5, started)
    os.kill(started[0][0].pid, signal.SIGKILL)
    wait_ranks(started)
    (ended,) = run_script(1, [TRAIN, *flags(data, run, resume="auto")])
    assert ended.code == 0, ended.output[-3000:]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [point.step for point in events.Scalars("Train/Samples/train_loss")]
    assert points == [24 * step for step in range(1, STEPS + 1)]


def test_one_rank_computes_what_two_do(data, tmp_path):
    """With every class in every step; a sample of them would differ, for it is drawn anew in each micro-batch."""
    lines = []
    for world_size in (1, 2):
        run = tmp_path / f"run{world_size}"
        ended = run_script(world_size, [TRAIN, *flags(data, run, workers=0, sample_rate=1.0)])
        assert ended[0].code == 0, ended[0].output[-3000:]
        lines.append(metrics(run))
    for one, two in zip(*lines, strict=True):
        for name in ("train_loss", "loss_positive", "loss_negative", "cosine_positive", "cosine_negative"):
            assert one[name] == pytest.approx(two[name], rel=2e-4, abs=1e-5), (one["step"], name)
        for name in ("grad_norm", "head_grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=5e-3), (one["step"], name)


@pytest.mark.parametrize("rank", [0, 1])
def test_error_on_one_rank_ends_all_and_is_noted(data, tmp_path, rank):
    run, script = tmp_path / "run", ROOT / "tests" / "failing_rank.py"
    ended = run_script(2, [script, *flags(data, run)], timeout=90, FAIL_RANK=str(rank), FAIL_STEP="4")
    assert all(each.code != 0 for each in ended)
    assert "No space left on device" in ended[rank].output
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left on device" in status["reason"]
    assert published(run / "checkpoints")[-1].name == "step_000000003"


def test_attempt_that_died_before_its_first_checkpoint_leaves_no_curve(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    started = start_ranks(1, [TRAIN, *flags(data, run, save_every_steps=1000)])
    wait_for_step(run, 2, started)
    os.kill(started[0][0].pid, signal.SIGKILL)
    wait_ranks(started)
    (ended,) = run_script(1, [TRAIN, *flags(data, run, save_every_steps=1000, resume="auto")])
    assert ended.code == 0, ended.output[-3000:]
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [point.step for point in events.Scalars("Train/Samples/train_loss")]
    assert points == [24 * step for step in range(1, STEPS + 1)]


def test_resumed_run_needs_neither_the_centers_nor_the_encoder_it_started_from(data, whole_run, tmp_path):
    """And computes on what that one computed: its activation is not the preset's."""
    import numpy as np

    from mlcd_ds.files import sha256

    data = copied(data, tmp_path)
    np.save(tmp_path / "centers.npy", np.random.default_rng(0).normal(size=(50, 128)).astype(np.float32))
    make_labels(data / "labels", centers_hash=sha256(tmp_path / "centers.npy"))
    shutil.copytree(whole_run[0], tmp_path / "first")
    described = find_encoder(tmp_path / "first") / "encoder.json"
    described.write_text(described.read_text().replace('"gelu"', '"quick_gelu"'))
    started_from = {
        "centers": tmp_path / "centers.npy",
        "init_from": tmp_path / "first",
        "resume": "auto",
        "workers": 0,
    }
    run = tmp_path / "run"
    started = start_ranks(1, [TRAIN, *flags(data, run, **started_from)])
    wait_for_step(run, 5, started)
    os.kill(started[0][0].pid, signal.SIGKILL)
    wait_ranks(started)
    (tmp_path / "centers.npy").unlink()
    shutil.rmtree(tmp_path / "first")
    (ended,) = run_script(1, [TRAIN, *flags(data, run, **started_from)])
    assert ended.code == 0, ended.output[-3000:]
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert "activation quick_gelu as in the weights it starts from" in ended.output
    assert encoder_config(run).activation == "quick_gelu"


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_a_run_starts_as_the_function_that_its_weights_were(data, tmp_path, monkeypatch, kind):
    """OpenAI's CLIP has quick_gelu: with the preset's gelu its weights are another function, of the same tensors."""
    there = preset("vit_toy").model_copy(update={"activation": "quick_gelu", "norm_eps": 1e-3})
    source = scrambled(there)
    if kind == "folder":
        hf.write_folder(tmp_path / "clip", there, source.state_dict(), "card")
    else:
        save_encoder(tmp_path / "clip" / "encoder", "vit_toy", there, source.state_dict())
    init_from = f"{'hf:' if kind == 'folder' else ''}{tmp_path / 'clip'}"
    config = RunConfig(deepspeed_config=str(ROOT / "ds_configs/cpu.json"), shards="s", labels="l",
                       output_dir=str(tmp_path / "run"), model="vit_toy", init_from=init_from, steps=2)  # fmt: skip
    raw, run, topology = load_deepspeed_config(config.deepspeed_config), RunFolder(config.output_dir), Topology.single()

    def planned(found):
        batch = BatchSizes.resolve(raw, 1)
        return train.plan_run(config, raw, batch, topology, 100, 1, (LabelsInfo(50, 8, "", ""),), source=found)

    plan = planned(train.starting_encoder(config, run))
    assert "activation quick_gelu as in the weights it starts from, norm_eps 0.001 as in" in plan.card
    train.check_start(config, plan, run)
    monkeypatch.setattr(train, "TrainEngine", lambda model, *rest: model)
    model = train.build_engine(config, plan, topology, None, None)
    pixels = images(there)
    with torch.no_grad():
        assert torch.equal(model(pixels), source(pixels))
    hf.write_folder(tmp_path / "out", model.config, model.state_dict(), "card")
    assert hf.read_config(tmp_path / "out") == there
    # The preset alone is refused, and so are other heads, which no tensor's shape shows.
    with pytest.raises(CheckpointError, match="activation quick_gelu there, gelu here"):
        train.build_engine(config, planned(None), topology, None, None)
    other = config.model_copy(update={"init_from": f"hf:{tmp_path / 'heads'}"})
    hf.write_folder(tmp_path / "heads", there.model_copy(update={"heads": 2}), source.state_dict(), "card")
    with pytest.raises(
        CheckpointError, match=r"heads holds another architecture \(heads 2 there, 4 here\). No --model"
    ):
        train.check_start(other, planned(train.starting_encoder(other, run)), run)


def test_finished_run_is_left_as_it_is(data, whole_run):
    run, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    (ended, _) = run_script(2, [TRAIN, *flags(data, run, resume="auto")])
    assert ended.code == 0, ended.output[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))


def test_dry_run_plans_for_any_world_size_without_a_process_group(data, tmp_path):
    (ended,) = run_script(
        1,
        [TRAIN, *flags(data, tmp_path / "run", dry_run=True, world_size=2)],
        MASTER_ADDR="203.0.113.1",
        MASTER_PORT="1",
    )
    assert ended.code == 0, ended.output
    assert "24 images = 12 a micro-batch x 1 accumulated x 2 ranks" in ended.output
    assert "rows a rank    25 centers" in ended.output
    assert not (tmp_path / "run").exists()


def test_it_starts_without_a_launcher(data, tmp_path):
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, TRAIN, *flags(data, tmp_path / "run", steps=2, workers=0)]
    done = subprocess.run(
        command, cwd=ROOT, env=mine | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done: 2 steps" in done.stdout


def refused(ended, code: int, *words: str) -> None:
    """Every rank ended with `code`; the message stands once per rank at most, as the last word, and has all `words`."""
    for rank in ended:
        assert rank.code == code, rank.output[-3000:]
        assert "Traceback" not in rank.output, rank.output[-3000:]
        assert sum(line.startswith("error") for line in rank.output.splitlines()) <= 1, rank.output[-3000:]
    last = ended[0].output.strip().splitlines()[-1]
    assert last.startswith("error: "), last
    for word in words:
        assert word in last, (word, last)


def copied(data: Path, folder: Path) -> Path:
    shutil.copytree(data, folder / "data")
    return folder / "data"


def test_truncated_tar_stops_every_rank(data, tmp_path):
    """Only the rank that reads the second tar sees it."""
    data = copied(data, tmp_path)
    tar = data / "tars" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:20_000])
    refused(run_script(2, [TRAIN, *flags(data, tmp_path / "run")]), 3, "is cut", "00001.tar")


def test_folder_in_use_stops_every_rank(data, tmp_path):
    run = tmp_path / "run"
    started = start_ranks(1, [TRAIN, *flags(data, run, steps=1000)])
    wait_for_step(run, 1, started)
    refused(
        run_script(2, [TRAIN, *flags(data, run, resume="auto")]), 4, str(run), "in use by process", "choose another"
    )
    os.kill(started[0][0].pid, signal.SIGKILL)
    wait_ranks(started)
    (ended,) = run_script(1, [TRAIN, *flags(data, run)])
    refused([ended], 4, str(run), "already holds a run", "--resume auto")
    (ended,) = run_script(1, [TRAIN, *flags(data, run, resume="auto", steps=1000, model="vit_s", image_size=32)])
    refused([ended], 4, "different run", "model: 'vit_toy' then, 'vit_s' now")


def test_too_many_broken_images_stop_every_rank(data, tmp_path):
    data = copied(data, tmp_path)
    samples = [(f"00001{row:04d}", {"jpg": picture(1000 + row)[:200]}) for row in range(41)]
    write_tar(data / "tars" / "00001.tar", samples)
    ended = run_script(2, [TRAIN, *flags(data, tmp_path / "run")])
    refused(ended, 3, "samples could not be used", "broken", "00001/00001", "--max_skipped_fraction")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "could not be used" in status["reason"]


def labels_of_another_k(data):
    make_labels(data / "labels", num_shards=1, k=49)
    return {}, 3, ("num_classes 49 against 50",)


def label_file_missing(data):
    (data / "labels" / "00002.parquet").unlink()
    return {}, 3, ("1 of 3 shards have no label file", "00002.parquet", "tools/assign_labels.py")


def labels_lack_keys(data):
    make_labels(data / "labels", images=20)
    return {}, 3, ("have no label", "--max_skipped_fraction")


def no_tar_matches(data):
    return {"shards": data / "nowhere" / "*.tar"}, 3, (str(data / "nowhere"),)


def typo_in_the_json(data):
    text = (data / "ds.json").read_text().replace('"train_batch_size"', '"gradient_cliping": 0.5, "train_batch_size"')
    (data / "ds.json").write_text(text)
    return {}, 2, ('unknown key "gradient_cliping"', 'did you mean "gradient_clipping"')


def labels_of_other_centers(data):
    np.save(data / "centers.npy", np.eye(50, 128, dtype=np.float32))
    return {"centers": data / "centers.npy"}, 3, ("are not the centers that the labels",)


def centers_of_two_heads_in_the_wrong_order(data):
    hashes = []
    for name, k in (("a", 50), ("b", 31)):
        np.save(data / f"{name}.npy", np.eye(k, 128, dtype=np.float32))
        hashes.append(sha256(data / f"{name}.npy"))
    make_labels(data / "labels", centers_hash=hashes[0])
    make_labels(data / "labels_text", k=31, centers_hash=hashes[1])
    wrong = {"labels": f"{data / 'labels'}::{data / 'labels_text'}", "centers": f"{data / 'a.npy'}::{data / 'a.npy'}"}
    return wrong, 3, (f"--centers {data / 'a.npy'} are not the centers that the labels in {data / 'labels_text'}",)


def second_label_folder_missing(data):
    return {"labels": f"{data / 'labels'}::{data / 'nowhere'}"}, 3, (f"the label folder {data / 'nowhere'} does not",)


def label_folders_of_different_keys(data):
    make_labels(data / "labels_text", images=20)
    words = (f"60 of 123 images have no label in {data / 'labels'} (0) or {data / 'labels_text'} (60)",)
    return {"labels": f"{data / 'labels'}::{data / 'labels_text'}"}, 3, words


def one_weight_for_two_heads(data):
    return {"labels": "a::b", "head_weights": 1}, 2, ("--head_weights names 1 weights, --labels 2 folders",)


def centers_of_another_width(data):
    import numpy as np

    np.save(data / "centers.npy", np.eye(50, 64, dtype=np.float32))
    make_labels(data / "labels", centers_hash=hashlib.sha256((data / "centers.npy").read_bytes()).hexdigest())
    return {"centers": data / "centers.npy"}, 3, ("shape [50, 64]", "embedding 128 dimensions")


def no_encoder_to_start_from(data):
    return {"init_from": data / "nowhere"}, 4, ("nowhere holds no encoder",)


def too_few_stored_labels(data):
    return {"num_positives": 9}, 3, ("store 8 centers an image", "--num_positives asks for 9")


def no_such_flag(data):
    return {"sample_rat": 0.5}, 2, ("--sample_rat", "--sample_rate")


def expected_more_ranks(data):
    return {"expect_world_size": 8}, 2, ("2 ranks were started", "--expect_world_size says 8", "hostfile")


@pytest.mark.parametrize(
    "spoil",
    [
        labels_of_another_k,
        label_file_missing,
        labels_lack_keys,
        no_tar_matches,
        typo_in_the_json,
        labels_of_other_centers,
        centers_of_another_width,
        no_encoder_to_start_from,
        centers_of_two_heads_in_the_wrong_order,
        second_label_folder_missing,
        label_folders_of_different_keys,
        one_weight_for_two_heads,
        too_few_stored_labels,
        no_such_flag,
        expected_more_ranks,
    ],
)
def test_bad_input_gives_one_message_with_the_cure(data, tmp_path, spoil):
    """At two ranks where the ranks may come to different verdicts; the others fail alike on any number."""
    data = copied(data, tmp_path)
    changes, code, words = spoil(data)
    divided = (labels_of_another_k, label_file_missing, labels_lack_keys, no_tar_matches, labels_of_other_centers)
    world_size = 2 if spoil in (*divided, expected_more_ranks) else 1
    refused(run_script(world_size, [TRAIN, *flags(data, tmp_path / "run", **changes)]), code, *words)
    assert not (tmp_path / "run" / "config.json").exists()
