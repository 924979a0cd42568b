"""Killed in the middle of every write, and just after the last: the same command then ends as an uninterrupted one does."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_factory import make_shards
from processes import ROOT, run_script
from test_assign import write_published
from test_kmeans import mixture, write_features

from mlcd_ds import files
from mlcd_ds.data.centers import save_centers

PATCHES = {"dictionary_size": 8, "patches_to_fit": 500, "patch_features": 8, "images_to_fit": 12}


def killed_everywhere(tmp_path: Path, command: str, settings: dict, writes: int) -> list[Path]:
    """The folder of the whole run, then one per kill; no temporary file is left in any."""
    output, report = tmp_path / "out", tmp_path / "report.json"
    worker = [ROOT / "tests" / "killed_worker.py", command, json.dumps(settings), output, report]
    (ended,) = run_script(1, worker)
    assert ended.code == 0, ended.output[-3000:]
    entries = json.loads(report.read_text())
    assert len(entries) == writes + 1
    assert all((entry["signal"], entry["code"]) == (signal.SIGKILL, 0) for entry in entries), ended.output[-3000:]
    folders = [output / "whole", *(output / f"{entry['write']}_{entry['place']}" for entry in entries)]
    for folder in folders:
        assert not list(folder.rglob("*.tmp"))
    return folders


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("tensorboard/")}


def assert_all_equal(folders: list[Path]) -> None:
    whole = contents(folders[0])
    for folder in folders[1:]:
        assert contents(folder) == whole, folder.name


def test_extraction(tmp_path):
    """Patch dictionary, features.json, then an array and its keys for each of two tars."""
    make_shards(tmp_path / "tars", 2, 6)
    settings = PATCHES | {"shards": f"{tmp_path / 'tars'}/*.tar"}
    assert_all_equal(killed_everywhere(tmp_path, "extract_features", settings, writes=6))


def test_clustering(tmp_path):
    """Centers and state of three iterations, then the final centers and their description."""
    write_features(tmp_path / "f", np.array_split(mixture(n=300), 2))
    settings = {"features": str(tmp_path / "f"), "k": 12, "iterations": 3}
    folders = killed_everywhere(tmp_path, "cluster", settings, writes=8)
    whole = json.loads((folders[0] / "centers.json").read_text())
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["centers.json", "centers.npy", "tensorboard"]
        assert (folder / "centers.npy").read_bytes() == (folders[0] / "centers.npy").read_bytes()
        found = json.loads((folder / "centers.json").read_text())
        assert all(found[name] == whole[name] for name in ("hash", "objective", "reseeded", "num_used", "k", "seed"))


@pytest.mark.parametrize("tar_of_key", [None, 5])
def test_labels(tmp_path, tar_of_key):
    """labels.json, then a label shard each; or two pieces, three label shards, and the note of what was grouped."""
    write_published(tmp_path / "f", mixture(n=90), tars=3, files=[50, 40])
    centers = mixture(seed=5, n=20).astype(np.float32)
    save_centers(tmp_path / "c", centers, {"feature_model": "unknown:f"})
    settings = {"features": str(tmp_path / "f"), "centers": str(tmp_path / "c"), "tar_of_key": tar_of_key}
    assert_all_equal(killed_everywhere(tmp_path, "assign_labels", settings, writes=3 if tar_of_key is None else 7))


def test_left_over_temporary_files_go_and_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    left = tmp_path / f"a.npy.{host}.{dead.pid}.tmp"
    living = [tmp_path / f"a.npy.{host}.{os.getpid()}.tmp", tmp_path / f"a.npy.elsewhere.{dead.pid}.tmp"]
    old = tmp_path / "b.npy.elsewhere.77.tmp"
    for file in (left, *living, old, tmp_path / "a.npy"):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert files.temporary_name(tmp_path / "a.npy") == living[0]
    assert files.remove_stale(tmp_path, tmp_path / "nowhere") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", *(file.name for file in living)}
