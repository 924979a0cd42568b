"""Toy shards: their layout, their truth, and what happens to a folder that is there already."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlcd_ds.config import ToyShardsConfig
from mlcd_ds.data.tars import read_samples
from mlcd_ds.data.toy import (
    MAX_OVERLAP,
    WORDS,
    _overlap,
    _places,
    caption,
    compose_scene,
    load_digits,
    write_toy_shards,
)
from mlcd_ds.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


def settings(folder: Path, **changes) -> ToyShardsConfig:
    return ToyShardsConfig(
        output_dir=str(folder), **({"num_train": 25, "num_test": 7, "images_per_shard": 10} | changes)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def caption_classes(text: str) -> set[int]:
    """{1, 6} of 'a picture of two sixes and a one'."""
    things = text.removeprefix("a picture of ").replace(" and ", ", ").split(", ")
    nouns = {thing.split()[1] for thing in things}
    return {digit for digit, word in enumerate(WORDS) if nouns & {word, f"{word}s", f"{word}es"}}


def test_layout_and_truth(tmp_path):
    assert write_toy_shards(settings(tmp_path))
    assert sorted(contents(tmp_path)) == [
        "classnames.txt",
        "dataset_type.txt",
        "test/00000.tar",
        "test/00000_stats.json",
        "toy.json",
        *(f"train/0000{n}{end}" for n in range(3) for end in (".tar", "_stats.json")),
        "zeroshot_classification_templates.txt",
    ]
    assert (tmp_path / "classnames.txt").read_text().split() == list(WORDS)
    counts = [json.loads((tmp_path / f"train/0000{n}_stats.json").read_text())["successes"] for n in range(3)]
    assert counts == [10, 10, 5]
    keys = []
    for n in range(3):
        for key, members in read_samples(tmp_path / f"train/0000{n}.tar"):
            record = json.loads(members["json"])
            text = members["txt"].decode()
            assert record["key"] == key and record["caption"] == text
            assert 1 <= len(record["classes"]) <= 4 and record["classes"] == sorted(set(record["classes"]))
            assert caption_classes(text) == set(record["classes"])
            image = Image.open(io.BytesIO(members["jpg"]))
            assert image.size == (32, 32) and image.mode == "RGB"
            keys.append(key)
    assert len(set(keys)) == 25 and keys[10] == "000010000"


def test_same_seed_same_bytes_and_other_seed_other_images(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_toy_shards(settings(tmp_path / name, seed=seed))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["train/00000.tar"] != c["train/00000.tar"]


def test_test_digits_are_never_train_digits():
    train, test = load_digits("train"), load_digits("test")
    assert len(train.classes) + len(test.classes) == 1797 and 0.18 < len(test.classes) / 1797 < 0.22
    assert set(test.classes) == set(range(10))
    seen = {pixels.tobytes() for pixels in train.pixels}
    assert not [pixels for pixels in test.pixels if pixels.tobytes() in seen]


def test_digits_lie_inside_and_hardly_overlap():
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 4) * 25:
        squares = _places(count, 32, generator)
        assert len(squares) == count
        assert all(0 <= x and 0 <= y and x + side <= 32 and y + side <= 32 for x, y, side in squares)
        assert all(_overlap(a, b) <= MAX_OVERLAP for a in squares for b in squares if a is not b)


def test_a_scene_shows_what_it_says():
    """Ink moves pixels: the same scene composed of blank digits differs just where digits are."""
    digits = load_digits("train")
    blank = type(digits)(np.zeros_like(digits.pixels), digits.classes)
    for seed in range(20):
        image, classes = compose_scene(digits, 48, np.random.default_rng(seed))
        empty, same_classes = compose_scene(blank, 48, np.random.default_rng(seed))
        assert classes == same_classes
        changed = (np.abs(image.astype(int) - empty).max(axis=2) > 30).mean()
        assert 0.02 * len(classes) < changed < 0.5


def test_caption():
    assert caption([3]) == "a picture of a three"
    assert caption([8, 1]) == "a picture of an eight and a one"
    assert caption([3, 8, 3, 1]) == "a picture of two threes, an eight and a one"
    assert caption([6, 6, 6]) == "a picture of three sixes"
    assert caption([3, 8, 0]) == "a picture of a three, an eight and a zero"


def test_finished_folder_is_kept_and_half_written_one_completed(tmp_path):
    config = settings(tmp_path / "toy")
    write_toy_shards(config)
    whole = contents(tmp_path / "toy")
    assert not write_toy_shards(config)
    # killed between two shards
    marker = tmp_path / "toy" / "toy.json"
    marker.write_text(marker.read_text().replace("true", "false"))
    (tmp_path / "toy/train/00001.tar").unlink()
    (tmp_path / "toy/train/00002_stats.json").unlink()
    assert write_toy_shards(config)
    assert contents(tmp_path / "toy") == whole


def test_foreign_or_other_shards_are_left_alone(tmp_path):
    write_toy_shards(settings(tmp_path / "toy"))
    before = contents(tmp_path / "toy")
    with pytest.raises(DataError, match=r"seed 0, not 1.*choose another --output_dir"):
        write_toy_shards(settings(tmp_path / "toy", seed=1))
    (tmp_path / "toy/toy.json").unlink()
    with pytest.raises(DataError, match=r"00000\.tar was not made by this tool"):
        write_toy_shards(settings(tmp_path / "toy"))
    del before["toy.json"]
    assert contents(tmp_path / "toy") == before


def test_the_door_works_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "tools/make_toy_shards.py"), "--output_dir", "toy", "--num_train=3"]
    done = subprocess.run([*command, "--num_test", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 train and 2 test scenes" in done.stdout and (tmp_path / "toy/test/00000.tar").exists()
    wrong = subprocess.run([*command, "--num_tset", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "--num_test" in wrong.stderr
