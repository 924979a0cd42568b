"""Side-car indexes: the same as a walk, and never believed where they do not fit."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from toy_data import make_shards

from mlcd_ds.config import IndexShardsConfig
from mlcd_ds.data import tar_index
from mlcd_ds.data.shards import build_shard_table
from mlcd_ds.data.tar_index import examine, find_index, index_path, index_shards, write_index
from mlcd_ds.data.tars import index_tar, read_samples, write_tar
from mlcd_ds.topology import Topology

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tar(tmp_path):
    samples = [(f"ü{i}", {"jpg": bytes([i]) * (i * 300), "json": b"{}"}) for i in range(9)]
    write_tar(tmp_path / "x.tar", [*samples, ("lonely", {"txt": b"no image"})])
    return tmp_path / "x.tar"


def test_an_index_is_what_a_walk_finds(tar):
    assert find_index(tar).source == "absent"
    path = write_index(index_tar(tar))
    assert path == index_path(tar) == tar.with_name("x_index.npz")
    found = find_index(tar)
    assert (found.index, found.source) == (index_tar(tar), "file")
    assert found.index.without_image == ("lonely",)
    assert list(read_samples(tar, index=found.index)) == list(read_samples(tar))
    before = path.read_bytes()
    write_index(index_tar(tar))
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["time", "size"])
def test_an_index_of_another_state_is_stale(tar, change):
    write_index(index_tar(tar))
    stat = tar.stat()
    if change == "size":
        tar.write_bytes(tar.read_bytes() + bytes(512))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns + (change == "time")))
    found = find_index(tar)
    assert (found.index, found.source) == (index_tar(tar), "stale")


def test_the_index_of_a_walk_is_of_the_file_that_was_walked(tar):
    walked, stat = index_tar(tar), tar.stat()
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # replaced between the walk and the writing
    write_index(walked)
    assert find_index(tar).source == "stale"


def test_every_damaged_index_is_found(tar):
    path = write_index(index_tar(tar))
    data, walked = path.read_bytes(), index_tar(tar)
    generator = np.random.default_rng(0)
    sources = []
    for trial in range(300):
        damaged = bytearray(data)
        if trial % 3:
            damaged[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        else:
            damaged = damaged[: generator.integers(len(data))]
        path.write_bytes(damaged)
        found = find_index(tar)
        assert found.index == walked, trial  # whatever it says, its contents are right
        sources.append(found.source)
    assert sources.count("damaged") > 200
    path.write_bytes(b"")
    assert find_index(tar).source == "damaged"


def test_an_index_cannot_run_code(tar, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    np.savez(index_path(tar), about=np.array([Evil()], object), allow_pickle=True)
    assert find_index(tar).source == "damaged" and not (tmp_path / "owned").exists()


@pytest.mark.parametrize("beside", [True, False])
def test_indexes_are_written_at_first_use_and_read_at_the_next(tmp_path, monkeypatch, beside):
    """Beside the tars, or, where nothing can be written there, in the run folder."""
    shards = make_shards(tmp_path, [5, 7, 3])
    folder = tmp_path / "run" / "index"
    if not beside:
        for shard in shards:
            index_path(shard).mkdir()  # root may write into any folder; over a folder nobody may

    def table():
        return build_shard_table(shards, [tmp_path / "labels"], 3, 0.0, None, Topology.single(), index_folder=folder)

    first = table()
    places = [index_path(shard) if beside else folder / index_path(shard).name for shard in shards]
    assert all(place.is_file() for place in places)
    with monkeypatch.context() as never_again:
        never_again.setattr(tar_index, "examine_tar", None)
        assert table() == first and not first.unused()
    places[1].write_bytes(b"nonsense")
    assert table() == first and not table().unused()  # written anew
    assert examine(shards[1], folder).source == "file"


def test_the_table_is_the_same_with_indexes_and_says_which_do_not_fit(tmp_path):
    shards = make_shards(tmp_path, [5, 7, 3])

    def table():
        return build_shard_table(shards, [tmp_path / "labels"], 3, 0.0, None, Topology.single())

    plain = table()
    command = [sys.executable, "tools/index_shards.py", "--shards", str(tmp_path / "tars" / "*.tar")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "3 indexes written (0 were stale, 0 damaged), 0 kept, 15 images" in ended.stdout
    assert table() == plain and not table().unused()
    index_path(shards[1]).write_bytes(b"nonsense")
    assert table().counts == plain.counts
    assert table().unused() == (
        "1 indexes are stale or damaged, their tars were walked: run tools/index_shards.py again",
    )
    with open(shards[2], "r+b") as file:  # noqa: PTH123
        file.truncate(1000)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 3 and "1 of 3 tars have no index" in ended.stderr and "Traceback" not in ended.stderr
    assert "1 indexes written (0 were stale, 1 damaged), 1 kept" in ended.stdout


def test_what_a_run_would_not_use_is_told(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "a.jpg", "b.jpg", "b.jpg", "c.txt", "noextension"):
            tar.addfile(tarfile.TarInfo(name))
    write_tar(tmp_path / "1.tar", [("k", {"jpg": b"x"})])
    index_shards(IndexShardsConfig(shards=f"{tmp_path}/*.tar"))
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"{tmp_path}/0.tar: 2 members repeat a name of their tar",
        f"{tmp_path}/0.tar: 1 members are not part of a sample",
        f"{tmp_path}/0.tar: 1 samples have no image",
    ]
    assert "2 indexes written" in last and "3 images; 2 members repeat a name" in last
