"""Runs over real hosts: the DeepSpeed launcher, pdsh and ssh between two and three hosts of this machine (hosts.py).

What is shown: the launcher's path from a hostfile to ranks on other hosts with other names, networks and processes; that
the place of a rank changes nothing; that a lost host ends the others; that fewer hosts go on.
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import hosts
import pytest
from data_factory import make_labels, make_shards
from processes import ROOT, run_script

STEPS, SAVED = 30, 5
KILLED_AFTER = 7
"""Steps, at least; the checkpoint before it is the one to go on from, unless the next one is quicker."""
GLOBAL_BATCH = 24
TIMEOUT_SECONDS = 60
LIMIT_SECONDS = 400
"""After which a run has failed, on a machine that is busy with other things."""
SETTINGS = {
    "train_batch_size": GLOBAL_BATCH,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "torch_adam": True}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000},
}
WHY_NOT = hosts.why_not()
if WHY_NOT:
    warnings.warn(f"NOT TESTED: runs over several hosts, for {WHY_NOT}", stacklevel=1)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"RUNS OVER SEVERAL HOSTS ARE NOT TESTED HERE: {WHY_NOT}")


class Runs:
    """A folder that all hosts share, and runs started in host1 as a user would."""

    def __init__(self, folder: Path, cluster: hosts.Hosts):
        self.folder, self.cluster = folder, cluster

    def flags(self, run: str, ranks: int, **changes) -> list[str]:
        """All images of a step in one micro-batch of every rank: another accumulation would draw other negatives."""
        values = {
            "deepspeed_config": self.folder / f"ds{ranks}.json", "shards": self.folder / "tars" / "{00000..00002}.tar",
            "labels": self.folder / "labels", "model": "vit_toy", "output_dir": self.folder / run, "steps": STEPS,
            "workers": 0, "save_every_steps": SAVED, "log_every_steps": 1, "sample_rate": 0.5, "resume": "auto",
            "timeout_minutes": TIMEOUT_SECONDS / 60,
        } | changes  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items()]

    def command(self, names: list[str], flags: list[str]) -> list:
        """deepspeed --hostfile, with one slot of each of these hosts."""
        hostfile = self.folder / f"hosts{len(names)}"
        hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
        return ["deepspeed", "--hostfile", hostfile, ROOT / "mlcd_ds" / "train.py", *flags]

    def metrics(self, run: str) -> list[dict]:
        path = self.folder / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi_node")
    make_shards(folder / "tars")
    make_labels(folder / "labels")
    for ranks in (2, 3):
        settings = SETTINGS | {"train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks}
        (folder / f"ds{ranks}.json").write_text(json.dumps(settings))
    # What the ranks of other hosts see of the environment: the launcher sends PYTHON* alone.
    carried = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in carried.items()))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{hosts.PATH}",
        "HOME": os.environ.get("HOME", "/root"),
        "DS_ACCELERATOR": "cpu",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with hosts.Hosts(folder / "cluster", 3, environment) as cluster:
        yield Runs(folder, cluster)


@pytest.fixture(scope="module")
def two(runs):
    """A run on two hosts, to its end: (exit code, output)."""
    command = runs.command(["host1", "host2"], runs.flags("two", 2, expect_world_size=2))
    return runs.cluster.run("host1", command, runs.folder, runs.folder / "two.log", LIMIT_SECONDS)


@pytest.fixture(scope="module")
def killed(runs):
    """A run on three hosts whose rank on the third is killed: exit code, output, seconds until all had ended, curve."""
    log = runs.folder / "killed.log"
    command = runs.command(["host1", "host2", "host3"], runs.flags("killed", 3, expect_world_size=3))
    started = runs.cluster.start("host1", command, runs.folder, log)
    try:
        ends = time.monotonic() + LIMIT_SECONDS
        while len(runs.metrics("killed")) < KILLED_AFTER:
            assert time.monotonic() < ends and started.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        launcher = runs.cluster.pids("host3", "deepspeed.launcher.launch")
        (rank,) = set(runs.cluster.pids("host3", "mlcd_ds/train.py")) - set(launcher)
        runs.cluster.send("host3", signal.SIGKILL, [rank])
        at = time.monotonic()
        code = started.wait(LIMIT_SECONDS)
        return {
            "code": code,
            "output": log.read_text(),
            "seconds": time.monotonic() - at,
            "curve": runs.metrics("killed"),
        }
    finally:
        started.kill()


def test_a_run_on_two_hosts_ends_with_the_losses_of_one_host(runs, two):
    code, output = two
    assert code == 0, output[-3000:]
    assert f"host1: done: {STEPS} steps" in output
    alone = run_script(2, [ROOT / "mlcd_ds" / "train.py", *runs.flags("alone", 2)], timeout=LIMIT_SECONDS)
    assert [rank.code for rank in alone] == [0, 0], alone[0].output[-3000:]
    assert [line["step"] for line in runs.metrics("two")] == list(range(1, STEPS + 1))
    for one, other in zip(runs.metrics("alone"), runs.metrics("two"), strict=True):
        for name in ("train_loss", "grad_norm", "head_grad_norm", "batch_crc32"):
            assert other[name] == one[name], (name, one["step"])


def test_a_rank_killed_on_one_host_ends_all_others_which_name_it(runs, killed):
    output = killed["output"]
    assert killed["code"] != 0
    assert killed["seconds"] < TIMEOUT_SECONDS
    for start in ("host1: error: ", "host2: error on rank 1: "):
        (error,) = [line for line in output.splitlines() if line.startswith(start)]
        assert "rank 2" in error, error
    for host in ("host1", "host2", "host3"):
        assert f"pdsh@host1: {host}: ssh exited with exit code" in output, output[-3000:]
        assert runs.cluster.pids(host, "mlcd_ds/train.py") == []
    assert json.loads((runs.folder / "killed" / "status.json").read_text())["state"] == "failed"


def test_fewer_hosts_go_on_to_the_end(runs, two, killed):
    """Three hosts until one is lost, then two: the curve of the run on two hosts that never stopped."""
    command = runs.command(["host1", "host2"], runs.flags("killed", 2))
    code, output = runs.cluster.run("host1", command, runs.folder, runs.folder / "resumed.log", LIMIT_SECONDS)
    assert code == 0, output[-3000:]
    assert "written by 3 ranks, on 2" in output and f"host1: done: {STEPS} steps" in output
    assert KILLED_AFTER <= len(killed["curve"]) < STEPS
    whole, of_both = runs.metrics("two"), runs.metrics("killed")
    assert [line["step"] for line in of_both] == list(range(1, STEPS + 1))
    for curve in (killed["curve"], of_both):
        for one, other in zip(whole, curve, strict=curve is of_both):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4), one["step"]
    # Rank 0's images of a step are the same again as soon as there are two ranks again.
    since = len(killed["curve"])
    checksums = [[line["batch_crc32"] for line in curve[since:]] for curve in (whole, of_both)]
    assert checksums[0] == checksums[1]
