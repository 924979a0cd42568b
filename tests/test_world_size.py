"""Going on at another number of ranks: weights, centers, moments, counts and settings exactly, samples each once."""

import json
from collections import Counter

import pytest
import torch
from data_factory import make_labels, make_shards
from processes import ROOT, run_script
from world_size_worker import CHAIN, SEED, STAGES, STEPS

from mlcd_ds.checkpoint import published, verify


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    """{chain: [what the last rank had in each act]}."""
    folder = tmp_path_factory.mktemp("chains")
    (ended,) = run_script(1, [ROOT / "tests" / "world_size_worker.py", folder], timeout=600)
    assert ended.code == 0, ended.output[-3000:]
    return {
        name: [
            torch.load(folder / name / f"act{number}_rank{CHAIN[number] - 1}.pt", weights_only=True)
            for number in range(len(stages))
        ]
        for name, stages in STAGES.items()
    }


def assert_same(found, expected, name):
    assert type(found) is type(expected), name
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected:
            assert_same(found[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    else:
        assert found == expected, name


@pytest.mark.parametrize("name", STAGES)
def test_every_part_of_the_state_is_the_same_right_after_loading(acts, name):
    """2 -> 1 -> 2 -> 3 -> 2 ranks at each ZeRO stage, and from stage to stage: bit for bit."""
    for number in range(1, len(acts[name])):
        loaded, saved = acts[name][number]["loaded"], acts[name][number - 1]["saved"]
        for part in saved:
            assert_same(loaded[part], saved[part], f"{name}, act {number}: {part}")
        assert len(saved["exp_avg"]) == len(saved["encoder"])
        assert all(moment.any() for moment in saved["exp_avg_sq"].values())
        assert saved["head"]["exp_avg_sq"].any() and saved["head"]["steps"].any()
        assert {group["weight_decay"] for group in saved["groups"]} == {0.1, 0.0}


@pytest.mark.parametrize("name", STAGES)
def test_steps_go_on_counting_one_by_one(acts, name):
    """At stage 3 DeepSpeed's load lets all parameters share one count, which each of them would advance."""
    begun = 1 if name == "0 bf16" else 0  # there DeepSpeed begins with a step of zero gradients
    for number, act in enumerate(acts[name]):
        assert set(act["saved"]["steps"]) == {(number + 1.0) * STEPS + begun}
        assert act["saved"]["global_steps"] == (number + 1) * STEPS
        assert set(act["saved"]["head"]["steps"].tolist()) == {(number + 1) * STEPS}


@pytest.mark.parametrize("name", STAGES)
def test_every_file_that_a_rank_writes_is_told(acts, name):
    """So that no checkpoint is published without one; what rank 0 writes beside them, it sees by itself."""
    of_rank_0 = {"encoder/encoder.json", "encoder/encoder.safetensors", "zero_to_fp32.py", "zero_to_torch.py"}
    for number, act in enumerate(acts[name]):
        assert set(act["not told"]) <= of_rank_0
        assert act["told"] >= 1 + 2 * CHAIN[number]  # the encoder's state, each rank's rows and generators


def test_all_chains_take_the_same_course(acts):
    """Every class takes part in every step, so that the loss hardly depends on who computes it."""
    for name, own in acts.items():
        losses = [loss for act in own for loss in act["losses"]]
        expected = [loss for act in acts["1"] for loss in act["losses"]][: len(losses)]
        assert losses == pytest.approx(expected, rel=1e-2 if "bf16" in name else 1e-5), name


@pytest.mark.parametrize("name", STAGES)
def test_random_generators_start_anew_by_seed_step_and_rank(acts, name):
    for number, act in list(enumerate(acts[name]))[1:]:
        assert act["initial_seed"] == (SEED + number * STEPS * 0x9E3779B1) * CHAIN[number] + CHAIN[number] - 1


def test_pickle_that_is_not_ours_and_an_encoder_that_is_another_are_refused_by_every_rank(acts):
    last = acts["1"][-1]
    assert "foreign_pickle/engine/zero_pp_rank_1_mp_rank_00_optim_states.pt would import" in last["foreign_pickle"]
    assert "system when it is loaded" in last["foreign_pickle"]
    assert "1 tensors differ (projection.weight)" in last["another_encoder"]
    assert "was written with ZeRO stage 0, this run has stage 1" in last["stage 0"]


GLOBAL_BATCH, LENGTH, KILLED = 24, 10, 9
RUN = "run [a+b]"
"""Characters that are patterns to DeepSpeed and its converter."""
SEGMENTS = ((2, 1, 3), (1, 0, 5), (2, 2, 7), (3, 0, 9), (2, 0, None))
"""Ranks, loader processes, and the step at which the run is killed; a checkpoint after every second."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: [how each rank ended]}, and the folder."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(folder / "tars")
    make_labels(folder / "labels")
    settings = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": 12,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000},
        "tensorboard": {"enabled": True},
    }
    (folder / "ds.json").write_text(json.dumps(settings))

    def flags(run, **changes):
        values = {
            "deepspeed_config": folder / "ds.json", "shards": folder / "tars" / "{00000..00002}.tar",
            "labels": folder / "labels", "model": "vit_toy", "output_dir": folder / run, "steps": LENGTH, "workers": 0,
            "save_every_steps": 2, "keep_last": 9, "log_every_steps": 1, "sample_rate": 1.0, "timeout_minutes": 1,
            "resume": "auto",
        } | changes  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items()]

    listed = [{"name": "whole", "world_size": 2, "flags": flags("whole")}]
    for number, (world_size, workers, stop) in enumerate(SEGMENTS):
        segment = {"name": f"segment{number}", "world_size": world_size, "flags": flags(RUN, workers=workers)}
        listed.append(segment | ({} if stop is None else {"stop": stop}))
    listed += [
        {
            "name": "reshard", "world_size": 1, "tool": "checkpoint.py",
            "flags": ["reshard", f"--path={folder}/{RUN}/checkpoints/step_000000008", "--world_size=3",
                      f"--output_dir={folder}/resharded"],
        },
        {"name": "resharded", "world_size": 3, "flags": flags("resharded")},
    ]  # fmt: skip
    listed.append({"name": "five", "world_size": 5, "flags": flags(RUN)})
    (folder / "runs.json").write_text(json.dumps(listed))
    (ended,) = run_script(1, [ROOT / "tests" / "forked_runs.py", folder], timeout=600)
    assert ended.code == 0, ended.output[-3000:]
    found = {
        run["name"]: [
            json.loads((folder / f"{run['name']}.{rank}.json").read_text()) for rank in range(run["world_size"])
        ]
        for run in listed
    }
    return folder, found


def images_of(ranks) -> dict[int, list]:
    """{step: [[key, CRC-32], ...]}, the images of all ranks in rank order."""
    return {
        step: [image for rank in ranks for image in rank["steps"][i][1]]
        for i, (step, _) in enumerate(ranks[0]["steps"])
    }


def test_runs_end_as_they_should(runs):
    _, found = runs
    for number, (world_size, _, stop) in enumerate(SEGMENTS):
        for rank in found[f"segment{number}"]:
            assert rank["code"] == (0 if stop is None else KILLED), rank["output"][-3000:]
        if number:
            was = SEGMENTS[number - 1][0]
            assert (
                f"step {2 * number}/{LENGTH}, written by {was} ranks, on {world_size}"
                in found[f"segment{number}"][0]["output"]
            )
    assert "24 images = 12 a micro-batch x 2 accumulated x 1 ranks" in found["segment1"][0]["output"]
    assert "24 images = 8 a micro-batch x 1 accumulated x 3 ranks, instead of" in found["segment3"][0]["output"]


def test_every_remaining_sample_of_the_epoch_is_seen_once(runs):
    """Keys and pixels of each step are those of the run that never stopped, on 2, 1, 2, 3 and 2 ranks."""
    _, found = runs
    whole = images_of(found["whole"])
    assert sorted(whole) == list(range(LENGTH))
    counted = {}
    for number, (_, _, stop) in enumerate(SEGMENTS):
        seen = images_of(found[f"segment{number}"])
        assert sorted(seen) == list(range(2 * number, LENGTH if stop is None else stop))
        counted |= seen  # the step after a checkpoint was lost with the kill, and is taken again
    assert counted == whole
    keys = [key for step in range(LENGTH) for key, _ in counted[step]]
    assert len(keys) == LENGTH * GLOBAL_BATCH
    assert max(Counter(keys).values()) == 2 and len(set(keys)) == 123


def test_curve_of_the_run_is_that_of_the_one_that_never_stopped(runs):
    folder, _ = runs
    whole, run = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", RUN)
    )
    assert [line["step"] for line in run] == list(range(1, LENGTH + 1))
    for one, other in zip(whole, run, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4), one["step"]
        assert other["lr_encoder"] == one["lr_encoder"]


def test_the_ledger_goes_on_and_reconciles_with_the_data(runs):
    """At each step what was counted is exactly what was read; at the end each tar's sum is what the plan has read of it."""
    folder, found = runs
    sums = {name: json.loads((folder / name / "skipped" / "by_shard.json").read_text()) for name in ("whole", RUN)}
    assert sums["whole"] == sums[RUN]
    read = Counter(key[:5] for images in images_of(found["whole"]).values() for key, _ in images)
    assert {name: row["decoded"] for name, row in sums[RUN].items()} == read
    assert sum(read.values()) == LENGTH * GLOBAL_BATCH
    lines = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_decoded"] for line in lines] == [step * GLOBAL_BATCH for step in range(1, LENGTH + 1)]
    own = [json.loads(line) for line in (folder / "resharded" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_decoded"] for line in own] == [9 * GLOBAL_BATCH, 10 * GLOBAL_BATCH]


def test_nothing_of_the_conversion_is_left(runs):
    folder, _ = runs
    names = [path.name for path in (folder / RUN / "checkpoints").iterdir()]
    assert sorted(names) == ["latest", *(f"step_{step:09d}" for step in range(2, LENGTH + 1, 2))]
    for path in published(folder / RUN / "checkpoints"):
        verify(path)


def test_ranks_that_cannot_share_the_global_batch_are_refused_with_those_that_can(runs):
    _, found = runs
    for rank in found["five"]:
        assert rank["code"] == 2
        assert "Traceback" not in rank["output"]
    last = found["five"][0]["output"].strip().splitlines()[-1]
    assert "global batch of 24 images, which 5 ranks cannot share evenly" in last
    assert last.endswith("near 5 that can: 1, 2, 3, 4, 6, 8")


def test_resharded_checkpoint_goes_on_at_the_number_of_ranks_it_was_made_for(runs):
    folder, found = runs
    (reshard,) = found["reshard"]
    assert reshard["code"] == 0, reshard["output"][-3000:]
    assert "step 8, written by 3 ranks, now of 3" in reshard["output"]
    for rank in found["resharded"]:
        assert rank["code"] == 0, rank["output"][-3000:]
    whole = images_of(found["whole"])
    assert images_of(found["resharded"]) == {step: whole[step] for step in (8, 9)}
    own = [json.loads(line) for line in (folder / "resharded" / "metrics.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] for line in own] == pytest.approx([line["train_loss"] for line in other[8:]], rel=1e-5)
    state = json.loads((folder / "resharded" / "checkpoints" / "step_000000008" / "state.json").read_text())
    assert state["engine_format"] == "universal" and state["world_size"] == 3
