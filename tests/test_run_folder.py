"""The run folder: what a resumed run may change, and what it notes when it ends."""

import json

import pytest

from mlcd_ds import errors
from mlcd_ds.errors import CheckpointError, DataError
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
        (record(zero={"stage": 2}), "zero_optimization.stage of the DeepSpeed JSON: 1 then, 2 now"),
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


def test_resumed_run_may_change_logs_buffers_and_micro_batches(tmp_path):
    RunFolder(tmp_path).write_config(record(tensorboard={"enabled": True}))
    changed = record(
        zero={"reduce_bucket_size": 5}, steps_per_print=3, train_micro_batch_size_per_gpu=2, activation_checkpointing={}
    )
    changed["settings"]["workers"] = 0
    RunFolder(tmp_path).write_config(changed)
    assert json.loads((tmp_path / "config.json").read_text())["deepspeed"]["steps_per_print"] == 3


def test_any_rank_notes_the_error_that_ends_the_run_and_the_first_word_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "SECONDS_FOR_RANK_0", 0.0)
    run = RunFolder(tmp_path)
    run.fail(DataError("before this run has taken the folder"), rank=0)
    assert not (tmp_path / "status.json").exists()
    run.is_ours, run.step = True, 7
    run.status("running", 7)
    run.fail(OSError(28, "No space left on device"), rank=1)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": "failed", "step": 7, "reason": "rank 1: OSError: [Errno 28] No space left on device"}
    run.fail(RuntimeError("connection closed by peer"), rank=0)
    assert json.loads((tmp_path / "status.json").read_text()) == status
    run.status("running", 8)
    run.fail(DataError("a broken tar"), rank=0)
    run.fail(DataError("late"), rank=2)
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "a broken tar"
