"""Faults of real runs on two ranks: what a signal, a full disk, bad numbers, a frozen, killed or stuck rank leave behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, free_port, run_script
from ranks import run_ranks

from mlcd_ds import run_loop, soak, watch
from mlcd_ds.checkpoint import published, step_of
from mlcd_ds.config import RunConfig
from mlcd_ds.errors import ConfigError, DeviceMemoryError, PeerError, Preempted
from mlcd_ds.run_folder import RunFolder
from mlcd_ds.run_loop import naming_memory_settings
from mlcd_ds.topology import Topology

PREEMPTED, BAD_NUMBERS, PEER_LOST, NOT_SAVED, NO_DATA = 75, 5, 6, 7, 3


def environment(**more: str) -> dict[str, str]:
    mine = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return os.environ | mine | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of each run of faults_worker.py."""
    folder = tmp_path_factory.mktemp("faults")
    (ended,) = run_script(1, [ROOT / "tests" / "faults_worker.py", folder], timeout=1200)
    assert ended.code == 0, ended.output[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(
    ("name", "signal_name", "rank"), [("term", "SIGTERM", 1), ("int", "SIGINT", 0), ("usr1", "SIGUSR1", 1)]
)
def test_a_signal_to_any_rank_stops_all_after_one_step_which_is_saved(found, name, signal_name, rank):
    """term: to rank 1 alone. int: to both, as a terminal does. usr1: to rank 1 while it writes a checkpoint."""
    run = found[name]
    assert run["codes"] == [PREEMPTED, PREEMPTED]
    status = run["status"]
    assert status["state"] == "preempted"
    assert status["step"] == run["checkpoints"][-1] >= 3  # nothing lost
    assert f"on rank {rank}: {signal_name}; saved as" in status["reason"]
    assert run["output"][0].strip().splitlines()[-1].startswith("stopped: after step")
    assert run["leftovers"] == []
    if name == "usr1":
        assert run["checkpoints"] == [4, 5]  # the save under way was finished


def test_a_signal_before_the_first_step_leaves_nothing_to_save(found):
    run = found["starting"]
    assert run["codes"] == [PREEMPTED, PREEMPTED]
    assert run["status"]["state"] == "preempted"
    assert "before the first step" in run["status"]["reason"]
    assert run["checkpoints"] == run["leftovers"] == []


def test_the_second_signal_ends_a_rank_that_hangs_at_once(found):
    run = found["twice"]
    assert run["codes"] == [128 + signal.SIGTERM, PEER_LOST]
    assert run["status"]["state"] == "failed"
    assert "a second SIGTERM" in run["status"]["reason"]
    assert "ends at once: a second SIGTERM" in run["output"][0]
    assert " in stuck\n" in run["output"][0]  # the stack of its main thread
    assert run["checkpoints"] == [2]


def test_a_killed_rank_ends_the_others_which_name_it(found):
    run = found["killed"]
    assert run["finished"]
    assert run["codes"] == [-signal.SIGKILL, PEER_LOST]
    last = run["output"][1].strip().splitlines()[-1]
    assert last.startswith("error on rank 1: rank 1 computes after step")
    for words in (
        "in forward (partial_fc.py:",
        "rank 0, which holds the ranks' store, does not answer",
        "--resume auto",
    ):
        assert words in last
    assert run["status"]["state"] == "failed"


def test_a_frozen_rank_ends_the_others_within_the_timeout(found):
    run = found["frozen"]
    assert run["finished"]
    assert run["codes"][0] == PEER_LOST and run["codes"][1] not in (0, None)
    last = run["output"][0].strip().splitlines()[-1]
    assert "rank 0 stood in " in run["output"][0] and "whose stack was:" in run["output"][0]
    for words in ("rank 0 computes after step", "Timed out", "rank(s) [1] do not answer", "last heard of: rank 1"):
        assert words in last


def test_a_stuck_reader_is_told_and_ends_the_run(found):
    run = found["reader"]
    assert run["codes"][0] == PEER_LOST and run["codes"][1] in (NO_DATA, PEER_LOST)
    assert "rank 1: WARNING: has waited" in run["output"][1]
    assert "for the data of step 5" in run["output"][1]
    assert "rank 1 waits for data after step 4" in run["output"][0]


def test_a_save_may_take_longer_than_other_waits(found):
    """Rank 1 writes for 15 s, --timeout_minutes is 12 s: rank 0 waits for it."""
    run = found["slow"]
    assert run["codes"] == [0, 0] and run["checkpoints"] == [2, 4]
    assert run["status"]["state"] == "done"


def test_a_tar_that_is_cut_during_the_run_is_counted_and_the_run_resumes(found):
    """All ranks make all steps; the sums are of the whole run, and add up to what was read of each tar."""
    assert found["cut"]["codes"] == [9, 9] and found["cut"]["checkpoints"] == [4, 6]
    run = found["cut, resumed"]
    assert run["codes"] == [0, 0], run["output"]
    assert [line["step"] for line in run["metrics"]] == list(range(1, 13))
    batch = 2 * 4
    for line in run["metrics"]:
        assert line["samples_decoded"] + line["samples_skipped"] == line["step"] * batch
    sums = json.loads(run["skipped"]["by_shard.json"])
    assert sum(row["decoded"] + row["skipped"] for row in sums.values()) == 12 * batch
    assert sums["00000"]["skipped"] == 0
    assert sums["00001"]["skipped"] == sums["00001"]["damaged_tar"] == run["metrics"][-1]["samples_skipped"] > 0
    names = "".join(text for name, text in run["skipped"].items() if name.startswith("rank_"))
    assert "00001: damaged_tar: the tar " in names
    assert "images are lost in 1 damaged or missing tars" in run["output"][0]  # the card of the second start


def test_failed_saves_leave_the_run_alive_until_three_in_a_row(found):
    run = found["disk"]
    assert run["codes"] == [NOT_SAVED, NOT_SAVED]
    assert run["checkpoints"] == [2, 8]
    assert run["leftovers"] == []
    assert [line["step"] for line in run["metrics"]] == list(range(1, 15))
    output = run["output"][0]
    for step, count in ((6, 2), (10, 1), (12, 2), (14, 3)):
        assert f"WARNING: CHECKPOINT NOT SAVED at step {step} ({count} in a row)" in output
    assert "saved step_000000008: " in output
    last = output.strip().splitlines()[-1]
    for words in ("error: 3 saves in a row have failed", "Read-only file system", "step_000000008", "--resume auto"):
        assert words in last
    assert run["status"]["state"] == "failed"


def test_bad_numbers_of_one_rank_skip_steps_and_end_the_run_after_three_in_a_row(found):
    run = found["numbers"]
    assert run["codes"] == [BAD_NUMBERS, BAD_NUMBERS]
    lines = {line["step"]: line for line in run["metrics"]}
    assert sorted(lines) == list(range(1, 10))  # the tenth ended the run
    for step, line in lines.items():
        bad = step in (3, 4) or step >= 8
        assert (line["train_loss"] is None) == (line["grad_norm"] is None) == bad
    assert [lines[step]["skipped_steps"] for step in (2, 3, 4, 5, 7, 8, 9)] == [0, 1, 2, 2, 2, 3, 4]
    assert lines[5]["lr_encoder"] == lines[3]["lr_encoder"]  # the schedule waited
    reason = run["status"]["reason"]
    for words in ("3 steps in a row, up to step 10", "embeddings of rank(s) [1]", "step_000000008"):
        assert words in reason
    assert "WARNING: step 8 was skipped, nothing has moved (1 in a row): loss nan" in run["output"][0]


def test_a_log_that_cannot_be_written_does_not_end_a_run_and_every_nth_checkpoint_is_kept(found):
    run = found["log"]
    assert run["codes"] == [0, 0]
    assert run["output"][0].count("metrics.jsonl cannot be written") == 1
    assert run["status"]["state"] == "done"
    assert [line["step"] for line in run["metrics"]] == [1, 3, 4, 5, 6]
    assert run["checkpoints"] == [2, 4, 6]  # keep_last 1, keep_every 2


def test_ranks_stop_when_the_launchers_runner_is_gone(tmp_path):
    """SIGTERM to DeepSpeed's runner ends the runner alone; its launcher and the ranks live on."""
    soak.make_data(tmp_path)
    run = tmp_path / "run"
    arguments = soak.Case(1, 0, 1).arguments(tmp_path, run, 100_000, 2)
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", "2", "--master_port", str(free_port()), ROOT / "mlcd_ds" / "train.py"]
    with (tmp_path / "log").open("w") as log:
        runner = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            wait_until(lambda: "step 3/" in (tmp_path / "log").read_text())
        finally:
            runner.terminate()
        runner.wait(30)
        wait_until(lambda: json.loads((run / "status.json").read_text())["state"] != "running")
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert "the runner (process" in status["reason"] and "is gone; saved as" in status["reason"]
    assert step_of(published(run / "checkpoints")[-1]) == status["step"]


def wait_until(holds, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_twenty_random_kills_resume_to_the_same_end(tmp_path):
    """At random times, in steps and in saves; keys, losses, norms and weights are those of undisturbed runs, bit for bit."""
    command = [sys.executable, ROOT / "tools" / "soak.py", "kills", "--kills", "20", "--seed", "1", "--steps", "6"]
    command += ["--output_dir", tmp_path / "soak", "--output", tmp_path / "kills.json", "--kills_per_run", "5"]
    command += ["--zero_stages", "1,3", "--workers", "0,2", "--accumulations", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads((tmp_path / "kills.json").read_text())
    assert counts["kills"] == 20
    assert counts["trouble"] == []
    assert counts["runs"] >= 4


def test_signals_that_come_together_are_one_request(monkeypatch):
    """A terminal's SIGINT reaches the ranks and the launcher, which passes on a SIGTERM of its own."""
    ended = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    with watch.Watch(Topology.single(), 1, 60, lambda reason: ended.append(reason)) as mine:
        mine.enter_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        wait_until(mine.stop_wanted, 10)
        assert mine.stop_reason == "SIGINT"
        time.sleep(watch.ONE_REQUEST_SECONDS + 0.3)
        assert ended == []
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: len(ended) == 2, 10)
        assert ended == ["a second SIGINT", 128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_signal_while_the_run_starts_is_raised_in_it():
    with pytest.raises(Preempted, match="SIGUSR1 before the first step"):
        with watch.Watch(Topology.single(), 1, 60):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)


def test_stacks_are_printed_on_demand_and_where_a_process_is_ended(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)

    def stands_here(seconds: float) -> None:
        time.sleep(seconds)

    with watch.Watch(Topology.single(), 0.005, 60) as mine:
        os.kill(os.getpid(), signal.SIGUSR2)
        stacks = capfd.readouterr().err
        assert "in test_stacks_are_printed" in stacks and "in _listen" in stacks  # the main thread and the watch's own
        mine.does(watch.WAITS_FOR_DATA, 4)
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            stands_here(0.1)
    said = capfd.readouterr()
    assert "in stands_here" in said.err and ended[0] == NO_DATA
    assert "ends at once: no data for step 5" in said.out


def test_only_errors_of_collectives_are_a_lost_peer(monkeypatch, capfd):
    mine = watch.Watch(Topology(0, 2, 0, 2, Topology.single().device), 1, 60)
    monkeypatch.setattr(mine, "peers", lambda: "rank(s) [1] do not answer")
    mine.does("saves", 12)
    with pytest.raises(RuntimeError, match="shapes"), mine.naming_peers():
        raise RuntimeError("shapes differ")
    with pytest.raises(
        PeerError, match=r"rank 0 saves after step 12: .* \(Connection closed by peer.*rank\(s\) \[1\] do not"
    ):
        with mine.naming_peers():
            raise RuntimeError(
                "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4. This is typical"
            )
    assert "rank 0 stood in a collective, whose stack was:\n  File " in capfd.readouterr().err


def test_lack_of_device_memory_names_what_takes_it(tmp_path):
    run = RunFolder(tmp_path)
    run.step = 7
    with pytest.raises(DeviceMemoryError, match="after step 7 .*CUDA out of memory.*train_micro_batch_size_per_gpu"):
        with naming_memory_settings(run):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def test_a_host_with_other_code_versions_or_settings_is_refused_by_every_rank():
    config = RunConfig(deepspeed_config="-", shards="-", labels="-", output_dir="-")
    own = run_loop.program(config, {"train_batch_size": 8})
    assert own["torch"] == torch.__version__.split("+")[0] or own["torch"] == torch.__version__
    run_ranks(2, lambda topology: run_loop.check_same_program(own, topology))
    for name, words in (("torch", "torch"), ("files of mlcd_ds", "files of mlcd_ds"), ("--seed", "--seed")):

        def refusal(topology, name=name):
            with pytest.raises(ConfigError) as caught:
                run_loop.check_same_program(own | ({name: "else"} if topology.rank == 1 else {}), topology)
            return str(caught.value)

        first, second = run_ranks(2, refusal)
        said = f"rank 1 runs another program than rank 0: {words} {own[name]} on rank 0, else on rank 1"
        assert first == second and said in first


def test_ranks_that_cannot_meet_say_why(monkeypatch):
    """A port that is in use; a rank 0, then a rank 1, that never come."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    first, second = (Topology(rank, 2, rank, 2, torch.device("cpu")) for rank in range(2))
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ConfigError, match=f"port {port} is in use, perhaps by another run.*--master_port"):
            first.start(0.02)
    for rank in (second, first):
        said = f"rank {rank.rank} of 2 has not met the others at 127.0.0.1:{port} within 0.02 minutes .*is a host down"
        with pytest.raises(PeerError, match=said):
            rank.start(0.02)
    assert not torch.distributed.is_initialized()


def test_no_launcher_no_watch(monkeypatch):
    """A run started from a shell outlives it."""
    monkeypatch.setattr(watch, "_command", lambda process: "bash start.sh")
    assert watch._launchers() == []
    commands = {os.getppid(): "python -m deepspeed.launcher.launch --world_info=", 7: "python /bin/deepspeed train.py"}
    monkeypatch.setattr(watch, "_command", lambda process: commands.get(process, ""))
    parents = {os.getppid(): 7}
    monkeypatch.setattr(watch, "_parent_of", lambda process: parents.get(process))
    (launcher, launcher_lives), (runner, runner_lives) = watch._launchers()
    assert launcher == f"the launcher (process {os.getppid()})" and runner == "the runner (process 7)"
    assert launcher_lives() and runner_lives()
    parents[os.getppid()] = 1
    assert launcher_lives() and not runner_lives()


def test_a_last_word_that_the_storage_does_not_take_ends_the_process_nevertheless(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(watch, "LAST_WORD_SECONDS", 0.1)
    monkeypatch.setattr(watch.os, "_exit", lambda code: ended.set())
    hangs = threading.Event()
    mine = watch.Watch(Topology.single(), 1, 60, lambda reason: hangs.wait(60))
    threading.Thread(target=mine._end, args=("no data", NO_DATA), daemon=True).start()
    assert ended.wait(10)
    hangs.set()


def test_a_rank_goes_on_telling_that_it_lives_once_the_store_answers_again(monkeypatch):
    """As where rank 0 was frozen for a while: later failures would name a live rank as silent."""
    told, frozen = [], iter((True, True, False))

    def set_value(key, value):
        if next(frozen, False):
            raise RuntimeError("wait timeout after 4000ms")
        told.append(json.loads(value)[0])

    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.01)
    mine = watch.Watch(Topology.single(), 1, 60)
    mine._store = SimpleNamespace(set=set_value)
    beating = threading.Thread(target=mine._keep_beating, daemon=True)
    beating.start()
    wait_until(lambda: len(told) >= 2, 10)
    mine.stop_beating()
    beating.join(10)
    assert told[:2] == [3, 4]
