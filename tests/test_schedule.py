"""Durations to steps."""

import math

import pytest

from mlcd_ds.config import RunConfig
from mlcd_ds.errors import ConfigError
from mlcd_ds.schedule import resolve_run_length


def run_config(**length) -> RunConfig:
    return RunConfig(deepspeed_config="x.json", shards="a.tar", labels="labels", output_dir="run", **length)


def test_paper_run_is_its_number_of_steps():
    length = resolve_run_length(run_config(), samples_per_epoch=400_000_000, global_batch=32_800)
    assert length.total_steps == math.ceil(32 * 400_000_000 / 32_800) == 390_244
    assert length.warmup_steps == 2000
    assert length.samples == length.total_steps * 32_800
    assert length.epochs == pytest.approx(32, rel=1e-5)
    assert "no length was given" in " ".join(length.notes)


@pytest.mark.parametrize(
    ("length", "samples_per_epoch", "batch", "steps"),
    [
        ({"epochs": 2}, 1000, 100, 20),
        ({"epochs": 2}, 1001, 100, 21),
        ({"epochs": 0.07}, 100, 1, 7),  # in floating point 0.07 * 100 is a little above 7
        ({"epochs": 2.9}, 100, 10, 29),
        ({"epochs": 0.1}, 30, 3, 1),
        ({"samples": 1000}, 77, 100, 10),
        ({"samples": 1001}, 77, 100, 11),
        ({"samples": 12_800_000_000}, 400_000_000, 32_800, 390_244),
        ({"steps": 17}, 5, 100, 17),
        ({"epochs": 1}, 5, 100, 1),
    ],
)
def test_steps(length, samples_per_epoch, batch, steps):
    result = resolve_run_length(run_config(**length), samples_per_epoch=samples_per_epoch, global_batch=batch)
    assert result.total_steps == steps
    assert result.samples == steps * batch
    assert result.epochs == pytest.approx(steps * batch / samples_per_epoch)


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"), [(1000, 2000, 100), (1000, 100, 100), (1000, 50, 50), (9, 5, 0)]
)
def test_warmup_is_at_most_a_tenth(steps, warmup, expected):
    config = run_config(steps=steps, warmup_steps=warmup)
    length = resolve_run_length(config, samples_per_epoch=100, global_batch=10)
    assert length.warmup_steps == expected
    assert any("tenth" in note for note in length.notes) == (expected < warmup)


def test_a_batch_larger_than_the_epoch_is_told():
    notes = resolve_run_length(run_config(steps=1), samples_per_epoch=99, global_batch=100).notes
    assert any("more than the 99 of an epoch" in note for note in notes)


def test_no_samples_is_an_error_naming_the_shards():
    with pytest.raises(ConfigError, match=r"a\.tar holds no labelled image"):
        resolve_run_length(run_config(), samples_per_epoch=0, global_batch=100)
