"""DeepSpeed's files: no pickle but ours gets near its load; converted ones fit every stage."""

import os
import pickle
import tarfile
import time

import pytest
import torch
from ranks import run_ranks

from mlcd_ds.collectives import on_main_for_long
from mlcd_ds.errors import CheckpointError
from mlcd_ds.universal import check_room, make_uniform, param_groups, refuse_foreign_pickles


class Attack:
    """Unpickled, it runs a command: makes the file `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class FakeScaler:
    """Of another module than DeepSpeed's, which is what a pickle names."""


def foreign_object(path, mark):
    torch.save({"optimizer_state_dict": {"loss_scaler": Attack(mark)}}, path)


def foreign_class(path, mark):
    torch.save({"optimizer_state_dict": {"loss_scaler": FakeScaler()}}, path)


def plain_pickle(path, mark):
    path.write_bytes(pickle.dumps(Attack(mark)))


def old_format(path, mark):
    torch.save({"a": Attack(mark)}, path, _use_new_zipfile_serialization=False)


def instance_opcode(path, mark):
    """INST names its class without a GLOBAL instruction."""
    torch.save({}, path)
    rewrite(path, b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.")


def stack_opcode(path, mark):
    """STACK_GLOBAL takes the names from strings."""
    torch.save({}, path)
    rewrite(path, b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.")


def rewrite(path, instructions):
    """Replaces the pickle in a file of torch.save, sum and all."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", instructions, len(instructions))
    writer.write_end_of_file()


def script(path, mark):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def tar(path, mark):
    member = path.with_suffix(".member")
    member.write_bytes(pickle.dumps(Attack(mark)))
    with tarfile.open(path, "w") as file:
        file.add(member, "storages")
    member.unlink()


def text(path, mark):
    path.write_text("not a checkpoint")


def empty(path, mark):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (foreign_object, "would import posix.system when it is loaded"),
        (foreign_class, "would import test_universal.FakeScaler when it is loaded"),
        *(
            (kind, "is not what torch.save writes")
            for kind in (plain_pickle, old_format, instance_opcode, stack_opcode)
        ),
        *((kind, "is not what torch.save writes") for kind in (script, tar, text, empty)),
    ],
)
def test_pickles_that_are_not_ours_are_refused_by_name_and_never_run(tmp_path, attack, words):
    engine, mark = tmp_path / "engine" / "zero", tmp_path / "mark"
    engine.mkdir(parents=True)
    torch.save({"module": {"weight": torch.zeros(2)}}, engine / "mp_rank_00_model_states.pt")
    refuse_foreign_pickles(tmp_path / "engine")
    path = engine / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    attack(path, mark)
    with pytest.raises(CheckpointError) as caught:
        refuse_foreign_pickles(tmp_path / "engine")
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert not mark.exists()


def test_the_attacks_are_real(tmp_path):
    """What is refused above would have run."""
    foreign_object(tmp_path / "file.pt", tmp_path / "mark")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


def test_each_rank_looks_at_a_share(tmp_path):
    for name in "abc":
        torch.save({}, tmp_path / f"{name}.pt")
    (tmp_path / "b.pt").write_text("damaged")
    refuse_foreign_pickles(tmp_path, 0, 2)
    with pytest.raises(CheckpointError, match="b.pt is not what torch.save writes"):
        refuse_foreign_pickles(tmp_path, 1, 2)


def test_flat_tensors_of_stage_3_become_records_that_every_stage_reads(tmp_path):
    groups = [{"lr": 0.1, "weight_decay": 0.2, "params": [0]}, {"lr": 0.1, "weight_decay": 0.0, "params": [1]}]
    state = {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(7.0)}}}, "param_groups": groups}
    (tmp_path / "zero" / "w").mkdir(parents=True)
    torch.save(state, tmp_path / "zero" / "optimizer_state.pt")
    states = {"param_shapes": [{"w": torch.Size([2, 3])}], "ds_version": "0.19.8"}
    torch.save(states, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for value, moment in enumerate(("fp32", "exp_avg", "exp_avg_sq")):
        torch.save(torch.arange(6.0) + value, tmp_path / "zero" / "w" / f"{moment}.pt")
    make_uniform(tmp_path)
    for value, moment in enumerate(("fp32", "exp_avg", "exp_avg_sq")):
        record = torch.load(tmp_path / "zero" / "w" / f"{moment}.pt", weights_only=True)
        assert torch.equal(record["param"], (torch.arange(6.0) + value).view(2, 3)) and record["cat_dim"] == 0
    assert torch.load(tmp_path / "zero" / "w" / "step.pt", weights_only=True) == 7
    assert [group["weight_decay"] for group in param_groups(tmp_path)] == [0.2, 0.0]
    assert (tmp_path / "mp_rank_00_model_states.pt").is_file()
    assert not list(tmp_path.rglob("*.tmp"))
    refuse_foreign_pickles(tmp_path)


def test_conversion_asks_for_room_before_it_begins(tmp_path, monkeypatch):
    (tmp_path / "step_000000001" / "engine").mkdir(parents=True)
    (tmp_path / "step_000000001" / "engine" / "a.pt").write_bytes(bytes(1000))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1999}))
    with pytest.raises(
        CheckpointError, match="to fit step_000000001 to another number of ranks takes 0.00 GB.*Make room"
    ):
        check_room(tmp_path / "step_000000001", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 2000}))
    check_room(tmp_path / "step_000000001", tmp_path)


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_wait_for_long_work_of_rank_0_beyond_their_timeout(world_size):
    def work(number):
        time.sleep(4)
        return 2 * number

    assert run_ranks(world_size, lambda topology: on_main_for_long(topology, work, 21), 3) == [42] * world_size


def test_every_rank_gets_the_error_of_long_work():
    def told(topology, error):
        def work():
            raise error

        with pytest.raises((CheckpointError, RuntimeError, ZeroDivisionError)) as caught:
            on_main_for_long(topology, work)
        return type(caught.value), str(caught.value)

    assert run_ranks(2, lambda t: told(t, CheckpointError("no room"))) == [(CheckpointError, "no room")] * 2
    first, second = run_ranks(2, lambda t: told(t, ZeroDivisionError("a fault")))
    assert first == (ZeroDivisionError, "a fault")
    assert second == (RuntimeError, "rank 0: ZeroDivisionError: a fault")
