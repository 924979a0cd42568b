"""What a run needs of its machine is looked at before it starts."""

import resource
import shutil
from types import SimpleNamespace

import pytest

from mlcd_ds import machine
from mlcd_ds.config import RunConfig
from mlcd_ds.errors import CheckpointError, ConfigError
from mlcd_ds.machine import Needs, check_machine, needs_of

PLENTY = Needs(shared_memory=1_000_000, open_files=100, checkpoint=1_000_000, kept=4)


@pytest.fixture
def give(monkeypatch, tmp_path):
    """A machine of these sizes; returns the limit of open files that was set."""
    limits = []

    def make(shared=(10**12, 10**12), files=(10**6, 10**6), disk=10**15):
        size, free = (number // 4096 for number in shared)
        monkeypatch.setattr(
            machine.os, "statvfs", lambda path: SimpleNamespace(f_frsize=4096, f_blocks=size, f_bavail=free)
        )
        monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(resource, "getrlimit", lambda kind: files)
        monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
        return limits

    return make


def test_a_large_machine_is_not_spoken_of(give, tmp_path):
    limits = give()
    assert check_machine(PLENTY, tmp_path) == [] and limits == []


def test_shared_memory_of_a_container(give, tmp_path):
    """Docker's 64 MB."""
    give(shared=(64 * 2**20, 64 * 2**20))
    needs = needs_of(config(workers=4, prefetch=4), 224, 256, 1, 1, 0, 10)
    assert needs.shared_memory == (4 * 4 + 3) * 256 * (3 * 224**2 + 8 * 8)
    (warning,) = check_machine(needs, tmp_path)  # it lasts where the steps are faster than the data
    assert "may need 732 MB of shared memory" in warning and "has 67 MB, of which 67 MB are free" in warning
    assert "they will die" in warning and "--shm-size" in warning
    larger = needs_of(config(workers=4, prefetch=4), 336, 512, 1, 1, 0, 10)  # not even one piece has room
    assert larger.piece_memory == 256 * (3 * 336**2 + 8 * 8)
    with pytest.raises(
        ConfigError, match="one piece of a batch takes 87 MB of shared memory, .* has 67 MB: .*would die.*--workers 0"
    ):
        check_machine(larger, tmp_path)
    assert needs_of(config(workers=0), 336, 512, 1, 1, 0, 10).piece_memory == 0
    give(shared=(10**9, 10**8))
    (warning,) = check_machine(needs, tmp_path)
    assert "of which 100 MB are free" in warning and "--prefetch" in warning
    assert needs_of(config(workers=0), 224, 256, 8, 8, 0, 10).shared_memory == 0
    assert needs_of(config(workers=4, prefetch=4), 224, 256, 8, 8, 0, 10).shared_memory == 8 * needs.shared_memory


def test_open_files(give, tmp_path, monkeypatch):
    needs = needs_of(config(workers=8, prefetch=4), 224, 1024, 8, 64, 0, 10)
    assert needs.open_files == 256 + 64 + 2 * (32 + 3 * 4) + 8 * 64
    needs = Needs(0, needs.open_files, 0, 1, piece_files=needs.piece_files)
    monkeypatch.setattr(machine, "_files_open_now", lambda: 100)
    limits = give(files=(920, 920))
    assert check_machine(needs, tmp_path) == [] and limits == []
    give(files=(256, 4096))
    assert check_machine(needs, tmp_path) == [] and limits == [(920, 4096)]  # what it may raise, it raises
    give(files=(128, 256))
    (warning,) = check_machine(needs, tmp_path)  # an estimate: connections depend on the network's library
    assert "may need 920 open files, this process may have 256" in warning and "ulimit -n 920" in warning
    assert limits[-1] == (256, 256)
    give(files=(102, 102))
    assert len(check_machine(needs, tmp_path)) == 1
    give(files=(101, 101))
    with pytest.raises(
        ConfigError,
        match="has 100 files open and needs 2 more for each piece of a batch, this process may have 101.*ulimit -n 920",
    ):
        check_machine(needs, tmp_path)


def test_room_for_checkpoints(give, tmp_path):
    give(disk=900_000)
    with pytest.raises(CheckpointError, match="has 1 MB free, one checkpoint takes about 1 MB. Make room"):
        check_machine(PLENTY, tmp_path)
    give(disk=3_500_000)
    (warning,) = check_machine(PLENTY, tmp_path)
    assert "4 checkpoints at a time of about 1 MB each will need 4 MB more" in warning and "--keep_last" in warning
    there = tmp_path / "checkpoints" / "step_000000002"
    there.mkdir(parents=True)
    (there / "x").write_bytes(bytes(1_000_000))
    assert check_machine(PLENTY, tmp_path) == []
    assert needs_of(config(keep_last=3, save_every_steps=5, keep_every=10), 224, 8, 1, 1, 7, 100).kept == 4 + 10


def test_the_real_machine_can_be_asked(tmp_path):
    assert check_machine(Needs(1, 1, 1, 1), tmp_path) == []
    assert 3 <= machine._files_open_now() < 10_000


def config(**flags) -> RunConfig:
    return RunConfig(deepspeed_config="-", shards="-", labels="-", output_dir="-", **flags)
