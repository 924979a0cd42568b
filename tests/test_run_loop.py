"""Runs with an engine that only writes: what saves that fail, and signals that come, at a wrong moment leave behind."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from toy_data import make_shards

from mlcd_ds import checkpoint, collectives, monitor, run_loop, universal
from mlcd_ds.checkpoint import CheckpointStore, published, step_of
from mlcd_ds.data import shards as shard_table
from mlcd_ds.data import tars
from mlcd_ds.errors import NonFiniteError, Preempted, SaveError
from mlcd_ds.files import save_tensors
from mlcd_ds.profiling import PhaseClock
from mlcd_ds.run_folder import RunFolder
from mlcd_ds.topology import Topology
from mlcd_ds.watch import Watch

STEPS, SAVE_EVERY = 4, 2


class Progress:
    """Tells nothing."""

    first_step = 0

    def __init__(self, *_, **__):
        pass

    def timing_waits(self, batches):
        return batches

    def report(self, *_):
        pass


class Loop:
    """A run of four steps, saved at every second. full: the saves, by number, that find no room; stop_after: this step."""

    def __init__(self, folder, monkeypatch, full=(), stop_after=None, max_failed_saves=3):
        self.folder, self.saves, self.full = folder, 0, full
        self.topology = Topology.single()
        self.store = CheckpointStore(folder, self.topology, 3)
        self.run = RunFolder(folder)
        monkeypatch.setattr(run_loop, "samples_per_second_at_peak", lambda *_: 1.0)
        monkeypatch.setattr(run_loop, "set_timeout_of_every_group", lambda *_: None)
        self.engine = SimpleNamespace(
            clock=PhaseClock(torch.device("cpu")), skipped_steps=0, not_finite=lambda: "",
            save=self.save, monitor_events=lambda events: None,
            tensorboard=None, train_step=self.step,
        )  # fmt: skip
        self.loader = SimpleNamespace(
            iterate=lambda first, last, ahead: iter(range(first, last)), close=lambda: None,
            totals=lambda: {"columns": [], "shards": {}},
        )  # fmt: skip
        self.config = SimpleNamespace(
            seed=0, profile_steps=None, max_bad_steps=5, max_bad_steps_of_1000=10, log_every_steps=1,
            save_every_steps=SAVE_EVERY, model="tiny",
            timeout_minutes=1, start_timeout_minutes=1, max_failed_saves=max_failed_saves,
        )  # fmt: skip
        self.plan = SimpleNamespace(
            settings=SimpleNamespace(global_batch=4, zero_stage=1), world_size=1,
            length=SimpleNamespace(total_steps=STEPS),
        )  # fmt: skip
        self.stop_after = stop_after
        self.watch = SimpleNamespace(
            enter_loop=lambda: None, does=lambda *_: None, stop_wanted=lambda: False, stop_reason="SIGTERM",
            in_loop=True, stop_beating=lambda: None,
        )  # fmt: skip

    def step(self, batch, step, **_):
        return SimpleNamespace(applied=True, stop_ranks=int(step + 1 == self.stop_after))

    def save(self, folder, model):
        self.saves += 1
        if self.saves in self.full:
            raise OSError(28, "No space left on device")
        checkpoint.save_rows(folder / "head", 0, 5, 5, {"centers": torch.zeros(5, 2)})
        save_tensors(folder / "ranks" / checkpoint.rank_file(0), {"torch": torch.get_rng_state()})
        (folder / "encoder" / "encoder.json").write_text("{}")

    def go(self):
        run_loop.run_steps(
            self.run, self.config, self.plan, self.topology, self.watch, engine=self.engine, loader=self.loader,
            store=self.store, found=None, samples_per_epoch=4, telling=Progress,
        )  # fmt: skip

    @property
    def steps(self):
        return [step_of(path) for path in published(self.folder / "checkpoints")]

    @property
    def status(self):
        return json.loads((self.folder / "status.json").read_text())


@pytest.mark.parametrize(
    ("every", "ended", "words"),
    [
        (1, 3, "3 steps in a row, up to step 3, were skipped .--max_bad_steps 3"),
        (2, 21, "11 of the last 1000 steps, up to step 21, were skipped .--max_bad_steps_of_1000 10"),
        (99, 991, "11 of the last 1000 steps, up to step 991"),
        (100, None, ""),  # ten in each thousand
    ],
)
def test_skipped_steps_end_a_run_in_a_row_or_when_they_are_many_of_late(tmp_path, every, ended, words):
    bad_steps = run_loop.BadSteps(3, 10, CheckpointStore(tmp_path, Topology.single(), 3))
    bad = {"loss": float("nan"), "grad_norm": 1.0, "head_grad_norms": (1.0,), "bad": "embeddings", "bad_ranks": (0,)}

    def go():
        for step in range(1, 5001):
            bad_steps.judge(step, SimpleNamespace(applied=(step - 1) % every > 0, **bad))

    if ended is None:
        return go()
    with pytest.raises(NonFiniteError, match=words) as caught:
        go()
    assert f"up to step {ended}," in str(caught.value)


def test_a_last_save_that_fails_once_is_tried_again(tmp_path, monkeypatch, capsys):
    loop = Loop(tmp_path, monkeypatch, full=(2,))
    loop.go()
    assert loop.steps == [2, 4] and loop.status["state"] == "done"
    assert "CHECKPOINT NOT SAVED at step 4 (1 in a row)" in capsys.readouterr().out


@pytest.mark.parametrize("max_failed_saves", [1, 2, 3])
def test_a_run_whose_last_step_is_not_saved_is_not_done(tmp_path, monkeypatch, max_failed_saves):
    loop = Loop(tmp_path, monkeypatch, full=(2, 3), max_failed_saves=max_failed_saves)
    with pytest.raises(SaveError, match="step_000000002.*Make room or mend the disk, then --resume auto"):
        loop.go()
    assert loop.steps == [2] and loop.status["state"] == "running"  # what ends a run is noted by run_loop.watched
    assert SaveError.exit_code == 7


@pytest.mark.parametrize(
    ("full", "stop_after", "words"),
    [
        ((), 3, "saved as .*step_000000003. --resume auto goes on from there"),
        ((2,), 3, "NOT SAVED.*Make room, then --resume auto: it goes on from step 2, .*step_000000002"),
        ((1,), 1, "NOT SAVED.*nor was any step before"),
    ],
)
def test_a_run_that_is_stopped_says_what_was_saved(tmp_path, monkeypatch, full, stop_after, words):
    loop = Loop(tmp_path, monkeypatch, full=full, stop_after=stop_after)
    with pytest.raises(Preempted, match=f"after step {stop_after}, on rank 0: SIGTERM; {words}"):
        loop.go()


def signalled(function):
    """`function`, in which a signal comes that asks the run to stop."""

    def call(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    return call


def test_a_signal_while_checkpoints_are_verified_leaves_them_as_they_are(tmp_path, monkeypatch):
    loop = Loop(tmp_path, monkeypatch)
    loop.go()
    monkeypatch.setattr(checkpoint, "sha256", signalled(checkpoint.sha256))
    with pytest.raises(Preempted, match="SIGTERM before the first step"):
        with Watch(loop.topology, 1, 60):
            loop.store.find(lambda text: pytest.fail(text))
    assert loop.steps == [2, 4]


def test_a_signal_while_files_are_read_is_no_fault_of_theirs(tmp_path, monkeypatch):
    """Where whatever a reader raises is damage: a tar's labels, a tar that is fetched, DeepSpeed's pickles."""
    shards = make_shards(tmp_path, [2])
    torch.save({}, tmp_path / "states.pt")
    pickles = torch.serialization
    names = {shard_table: "read_label_shard", tars: "_open_remote", pickles: "get_unsafe_globals_in_checkpoint"}
    readers = {
        shard_table: lambda: shard_table.build_shard_table(
            shards, [tmp_path / "labels"], 3, 0.0, None, Topology.single()
        ),
        tars: lambda: tars.local_shard(f"local://{shards[0]}", str(tmp_path / "cache")),
        pickles: lambda: universal.refuse_foreign_pickles(tmp_path),
    }
    for owner, read in readers.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, names[owner], signalled(getattr(owner, names[owner])))
            with pytest.raises(Preempted), Watch(Topology.single(), 1, 60):
                read()
    assert list((tmp_path / "cache").rglob("*.tmp")) == []


def test_a_signal_in_what_rank_0_does_for_all_stops_every_rank():
    def stop():
        raise Preempted("asked to")

    def on(topology):
        with pytest.raises(Preempted, match="asked to"):
            collectives.on_main(topology, stop)

    run_ranks(2, on)


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_at_the_end_leaves_no_run_that_seems_to_run(tmp_path, monkeypatch):
    loop = Loop(tmp_path, monkeypatch)
    write = loop.run.status
    loop.run.status = lambda state, *rest: full() if state == "done" else write(state, *rest)
    with pytest.raises(
        SaveError, match="status.json, though the last step is saved, could not be written: No space left"
    ):
        loop.go()
    assert loop.steps == [2, 4] and loop.status["saved"] == 4


def test_a_log_that_cannot_be_begun_ends_the_start_of_every_rank(tmp_path, monkeypatch):
    loop = Loop(tmp_path, monkeypatch)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    monkeypatch.setattr(monitor, "write_text", full)

    def on(topology):
        with pytest.raises(SaveError, match="metrics.jsonl could not be written: No space left"):
            run_loop.open_monitor(loop.run, loop.engine, 2, loop.plan, topology)

    run_ranks(2, on)
