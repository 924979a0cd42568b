"""tools/bench.py data: its contenders do the same work, and what it writes is complete. No times are judged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_data import encode, make_shards, picture

from mlcd_ds.benchmarks.data import bench_data, made_photograph, pillow_random_crop
from mlcd_ds.config import BenchDataConfig
from mlcd_ds.data.decode import decode_image
from mlcd_ds.data.transforms import random_resized_crop
from mlcd_ds.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_writes_every_part_and_no_path(tmp_path):
    make_shards(tmp_path, [5, 3])
    output = tmp_path / "data.json"
    command = [sys.executable, "tools/bench.py", "data", "--shards", str(tmp_path / "tars" / "*.tar")]
    command += ["--small_images", "6", "--image_size", "40", "--repeats", "1", "--output", str(output)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    text = output.read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    result = json.loads(text)
    assert result["command"].startswith("python tools/bench.py data --shards *.tar --image_size 40")
    assert set(result["tars"]) == {"--shards", "32 x 32", "32 x 32, by webdataset"}
    assert result["tars"]["--shards"]["samples"] == 8 and result["tars"]["32 x 32"]["samples"] == 6
    for part in ("decode", "loader"):
        assert set(result[part]) == {"--shards", "32 x 32"}
    row = result["decode"]["--shards"]
    assert row["lost"] == [] and row["decibels"]["lowest"] > 38 and row["images"] == 8
    for rows in (result["tars"], result["decode"], result["loader"]):
        for row in rows.values():
            assert all(math.isfinite(v) and v > 0 for k, v in row.items() if "_per_" in k)
    assert all(not path.name.endswith("_index.npz") for path in (tmp_path / "tars").iterdir())


def test_pillows_random_crop_is_ours():
    data = encode(picture(3, 90, 70), "PNG")
    for seed in range(5):
        theirs = pillow_random_crop(data, 32, 0.4, np.random.default_rng(seed))
        ours = random_resized_crop(decode_image(data, 10**6), 32, 0.4, False, np.random.default_rng(seed))
        assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 3  # it sees a little beyond the crop's edges


def test_made_photographs_differ_and_repeat():
    assert made_photograph(1, 64, 48) == made_photograph(1, 64, 48) != made_photograph(2, 64, 48)
    assert decode_image(made_photograph(1, 64, 48), 10**6).shape == (48, 64, 3)


def test_what_it_refuses(tmp_path):
    with pytest.raises(ConfigError, match="folder does not exist"):
        bench_data(BenchDataConfig(output="no/such/folder/x.json"))
    shards = make_shards(tmp_path, [2], {"000000000": b"", "000000001": b"x"})
    with pytest.raises(DataError, match="no image of --shards can be read: 2 not by Pillow"):
        bench_data(BenchDataConfig(shards=shards[0], small_images=2, repeats=1))
