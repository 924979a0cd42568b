"""The run folder: what a resumed run may change, and what it notes when it ends."""

import json
import resource
import subprocess
import sys

import pytest
from processes import ROOT

from mlcd_ds import errors, run_folder
from mlcd_ds.config import DeepSpeedDefaults
from mlcd_ds.ds_config import BatchSizes, resolve_deepspeed_config
from mlcd_ds.errors import CheckpointError, DataError, SaveError
from mlcd_ds.run_folder import RunFolder


def record(**deepspeed):
    settings = {"seed": 0, "workers": 4, "output_dir": "run"}
    zero = {"stage": 1, "reduce_bucket_size": 1000} | deepspeed.pop("zero", {})
    return {
        "settings": settings,
        "facts": {"num_classes": 50},
        "deepspeed": {"train_batch_size": 24, "gradient_clipping": 1.0, "zero_optimization": zero} | deepspeed,
    }


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (record(gradient_clipping=0.5), "gradient_clipping of the DeepSpeed JSON: 1.0 then, 0.5 now"),
        (
            record(optimizer={"params": {"lr": 1e-3}}),
            "optimizer.params.lr of the DeepSpeed JSON: 'absent' then, 0.001 now",
        ),
        (record() | {"facts": {"num_classes": 51}}, "num_classes: 50 then, 51 now"),
        (record() | {"settings": {"seed": 1}}, "seed: 0 then, 1 now"),
    ],
)
def test_resumed_run_may_not_change_what_enters_the_numbers(tmp_path, changed, words):
    RunFolder(tmp_path).write_config(record())
    with pytest.raises(CheckpointError) as caught:
        RunFolder(tmp_path).write_config(changed)
    assert words in str(caught.value)
    assert str(caught.value).count(" then, ") == 1


def resolved(**changes):
    """What train.py compares: a JSON after ds_config has filled it in."""
    raw = {
        "train_batch_size": 24,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
    } | changes
    settings = resolve_deepspeed_config(
        raw, batch=BatchSizes.resolve(raw, 1), total_steps=10, warmup_steps=1, output_dir="run", device_type="cpu",
        defaults=DeepSpeedDefaults(),
    )  # fmt: skip
    return record() | {"deepspeed": settings.json}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps_per_print": 10},
        {"wall_clock_breakdown": True},
        {"tensorboard": {"enabled": True}},
        {"activation_checkpointing": {}},
        {"train_micro_batch_size_per_gpu": 12},
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000, "round_robin_gradients": False}},
    ],
)
def test_logs_monitors_and_buffers_may_change_in_the_json(tmp_path, changes):
    RunFolder(tmp_path).write_config(resolved())
    RunFolder(tmp_path).write_config(resolved(**changes))
    with pytest.raises(CheckpointError, match=r"optimizer.params.lr of the DeepSpeed JSON: 0.001 then, 0.01 now"):
        RunFolder(tmp_path).write_config(
            resolved(optimizer={"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}})
        )


def test_resumed_run_may_change_logs_buffers_and_micro_batches(tmp_path):
    RunFolder(tmp_path).write_config(record(tensorboard={"enabled": True}))
    changed = record(
        zero={"reduce_bucket_size": 5}, steps_per_print=3, train_micro_batch_size_per_gpu=2, activation_checkpointing={}
    )
    changed["settings"]["workers"] = 0
    RunFolder(tmp_path).write_config(changed)
    assert json.loads((tmp_path / "config.json").read_text())["deepspeed"]["steps_per_print"] == 3


def test_resumed_run_may_change_its_number_of_ranks_and_zero_stage(tmp_path):
    before, now = record(), record(zero={"stage": 3}, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=4)
    before["facts"] |= {"world_size": 2, "zero_stage": 1, "global_batch": 24}
    now["facts"] |= {"world_size": 3, "zero_stage": 3, "global_batch": 24}
    run = RunFolder(tmp_path)
    assert run.global_batch() is None
    run.write_config(before)
    assert run.global_batch() == 24
    run.write_config(now)
    now["facts"]["global_batch"] = 36
    with pytest.raises(CheckpointError, match="global_batch: 24 then, 36 now"):
        run.write_config(now)


def test_digests_of_several_parts_are_compared_as_far_as_both_have_them(tmp_path, capsys):
    """Earlier versions had no digest of the images' keys; of damaged tars their order may not be known."""

    def start(data, order):
        RunFolder(tmp_path).write_config(record() | {"facts": {"data": data, "order": order}})
        facts = json.loads((tmp_path / "config.json").read_text())["facts"]
        return facts["data"], facts["order"], capsys.readouterr().out

    assert start("names", "plan") == ("names", "plan", "")
    data, order, told = start("names-keys", "plan-within")  # the version after it
    assert (data, order) == ("names-keys", "plan-within")
    assert "the keys of the images could not be compared" in told and "the order of the images within each tar" in told
    for changed in (("names-other", "plan-within"), ("other-keys", "plan-within"), ("names-keys", "plan-other")):
        with pytest.raises(CheckpointError, match="then, '(names|other)-|then, 'plan-other' now"):
            start(*changed)
    data, order, told = start("names-keys", "plan")  # a tar is damaged
    assert (data, order) == ("names-keys", "plan-within") and told.count("could not be compared") == 1
    assert start("names-keys", "plan-within") == ("names-keys", "plan-within", "")
    with pytest.raises(CheckpointError, match="order: 'plan-within' then, 'plan-other' now"):
        start("names-keys", "plan-other")


def test_what_is_allowed_by_name_may_change_and_is_said(tmp_path, capsys):
    before = record(optimizer={"params": {"lr": 1e-3}})
    before["facts"] |= {"data": "a", "order": "b"}
    now = record(optimizer={"params": {"lr": 1e-4}})
    now["facts"] |= {"data": "c", "order": "d"}
    now["settings"]["seed"] = 3
    RunFolder(tmp_path).write_config(before)
    for names in (None, "seed", "data,optimizer.params.lr", "seed,data"):
        with pytest.raises(CheckpointError, match="holds a different run.*If you mean to change it: --allow_changed "):
            RunFolder(tmp_path).write_config(now, names)
    RunFolder(tmp_path).write_config(now, "seed, data,optimizer.params.lr")
    said = capsys.readouterr().out.splitlines()
    assert "--allow_changed: seed: 0 then, 3 now" in said and "--allow_changed: data: 'a' then, 'c' now" in said
    assert "--allow_changed: optimizer.params.lr of the DeepSpeed JSON: 0.001 then, 0.0001 now" in said
    RunFolder(tmp_path).write_config(now)  # what it is now


@pytest.mark.parametrize("name", ["num_classes", "precision", "global_batch"])
def test_what_cannot_fit_is_refused_though_it_is_allowed(tmp_path, name):
    before, now = record(), record()
    before["facts"][name], now["facts"][name] = 1, 2
    RunFolder(tmp_path).write_config(before)
    with pytest.raises(CheckpointError, match=f"{name}: 1 then, 2 now.*another --output_dir.$"):
        RunFolder(tmp_path).write_config(now, name)


def test_any_rank_notes_the_error_that_ends_the_run_and_the_first_word_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "SECONDS_FOR_RANK_0", 0.0)
    run = RunFolder(tmp_path)
    run.fail(DataError("before this run has taken the folder"), rank=0)
    assert not (tmp_path / "status.json").exists()
    run.is_ours, run.step = True, 7
    run.status("running", 7)
    run.fail(OSError(28, "No space left on device"), rank=1)
    status = json.loads((tmp_path / "status.json").read_text())
    reason = "rank 1: OSError: [Errno 28] No space left on device"
    assert status == {"state": "failed", "step": 7, "saved": 0, "reason": reason}
    run.fail(RuntimeError("connection closed by peer"), rank=0)
    assert json.loads((tmp_path / "status.json").read_text()) == status
    run.status("running", 8)
    run.fail(DataError("a broken tar"), rank=0)
    run.fail(DataError("late"), rank=2)
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "a broken tar"


def test_noting_an_error_never_hides_it(tmp_path, monkeypatch, capsys):
    """The disk may be what failed."""
    monkeypatch.setattr(errors, "SECONDS_FOR_RANK_0", 0.0)
    run = RunFolder(tmp_path / "gone")
    run.is_ours = True
    for rank in (0, 1):
        run.fail(DataError("the disk is gone"), rank)
    assert capsys.readouterr().out.count("could not be written") == 2


def test_ranks_that_fail_together_leave_one_whole_status(tmp_path):
    code = (
        "import sys; from mlcd_ds import errors; from mlcd_ds.run_folder import RunFolder\n"
        "errors.SECONDS_FOR_RANK_0 = 0.2; run = RunFolder(sys.argv[1]); run.is_ours = True\n"
        "run.fail(errors.DataError('no disk'), int(sys.argv[2]))"
    )
    RunFolder(tmp_path).status("running", 3)
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)], cwd=ROOT) for rank in range(1, 4)
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and status["reason"].endswith("no disk")
    assert list(tmp_path.glob("*.tmp")) == []


def test_folder_of_a_run_that_never_began_is_taken_and_a_damaged_config_is_named(tmp_path):
    first = RunFolder(tmp_path)
    first.open(resume=False)
    first.write_config(record())
    second = RunFolder(tmp_path)
    second.open(resume=False)
    second.write_config(record() | {"settings": {"seed": 5}})
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder(tmp_path).open(resume=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        RunFolder(tmp_path).write_config(record())


def began(folder, **status):
    """A run folder as a run leaves it that has logged a step; status: what its status.json holds, None for none."""
    run = RunFolder(folder)
    run.open(resume=True)
    run.write_config(record())
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "status.json").write_text(json.dumps({"reason": "", "step": 0} | status))


@pytest.mark.parametrize(
    "status",
    [
        {"state": "running", "step": 40, "saved": 40},
        {"state": "failed", "step": 45, "saved": 40},
        {"state": "running", "step": 40},  # of an earlier version
        {"state": "preempted", "step": 40, "reason": "after step 40, on rank 0: SIGTERM; saved as step_000000040"},
    ],
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path, status):
    began(tmp_path, **status)
    for make in (lambda: None, (tmp_path / "checkpoints").mkdir):
        make()
        with pytest.raises(
            CheckpointError, match=r"checkpoints holds no checkpoint, though step 40 was saved.*Put them"
        ):
            RunFolder(tmp_path).open(resume=True)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="already holds a run"):
        RunFolder(tmp_path).open(resume=False)
    (tmp_path / "checkpoints" / "step_000000040").mkdir()
    run = RunFolder(tmp_path)
    run.open(resume=True)
    run.write_config(record())  # what was saved is still known when this start fails, to any rank
    other = RunFolder(tmp_path)
    other.is_ours = True
    other.fail(DataError("no"), rank=0)
    assert json.loads((tmp_path / "status.json").read_text())["saved"] == 40


@pytest.mark.parametrize(
    "status", [{"state": "running"}, {"state": "failed", "step": 3}, {"state": "failed", "step": 3, "saved": 0}]
)
def test_a_run_that_had_saved_nothing_begins_anew(tmp_path, status):
    began(tmp_path, **status)
    (tmp_path / "checkpoints" / "step_000000002.tmp").mkdir(parents=True)
    RunFolder(tmp_path).open(resume=True)


def test_a_run_of_which_only_damaged_checkpoints_are_left_is_not_begun_anew(tmp_path):
    began(tmp_path, state="running")
    (tmp_path / "checkpoints" / "damaged_step_000000040").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint, though it holds damaged_step_000000040"):
        RunFolder(tmp_path).open(resume=True)


def test_a_full_disk_at_the_start_has_a_cure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = RunFolder(tmp_path)
    run.open(resume=True)
    monkeypatch.setattr(run_folder, "write_json", full)
    with pytest.raises(SaveError, match="config.json could not be written: No space left on device. Make room.*resume"):
        run.write_config(record())


def test_a_full_disk_that_lets_no_lock_be_written_has_a_cure(tmp_path):
    run, before = RunFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(SaveError, match=".lock could not be written: File too large"):
            run.open(resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
