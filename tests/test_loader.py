"""The order of samples, and batches that depend on neither ranks nor loader processes."""

import errno
import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from toy_data import encode, labels_of, make_shards, picture, write_labels

from mlcd_ds import train
from mlcd_ds.batch import NO_IMAGE, NO_LABEL, ImageLabelBatch
from mlcd_ds.config import RunConfig
from mlcd_ds.data import loader as loader_module
from mlcd_ds.data import storage, tars
from mlcd_ds.data.decode import ImageError
from mlcd_ds.data.labels import LabelsInfo, draw_positives, label_path, write_label_shard
from mlcd_ds.data.loader import ImageLabelLoader
from mlcd_ds.data.plan import EpochPlan, augmentation_generator, positives_generator
from mlcd_ds.data.shards import ShardReader, build_shard_table
from mlcd_ds.data.tar_index import write_index
from mlcd_ds.data.tars import index_tar
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.topology import Topology

# ------------------------------------------------------------------------------------------------ the plan

PLANS = [
    ([5, 7, 1, 12, 9], 8, 3),
    ([10] * 6, 12, 4),
    ([3], 7, 2),
    ([1, 1, 1, 1], 4, 100),
    ([40, 50], 6, 1),
    ([2, 3], 64, 5),
]


@pytest.mark.parametrize("counts, batch, window", PLANS)
def test_every_lane_visits_each_sample_of_an_epoch_once_and_in_turn(counts, batch, window):
    plan = EpochPlan(3, counts, batch, window)
    q, size = plan.samples_per_lane, plan.num_samples
    assert plan.lanes * q == batch and plan.lanes <= len(counts)
    steps = 3 * size // q + 2
    whole_epochs = Counter()
    for lane in range(plan.lanes):
        stream = [s for t in range(steps) for s in plan.samples(t, lane * q, (lane + 1) * q)]
        length = (lane + 1) * size // plan.lanes - lane * size // plan.lanes
        epochs = [epoch for epoch, _, _ in stream]
        assert epochs == [p // length for p in range(len(stream))]  # nothing dropped where epochs meet
        whole_epochs.update(sample for sample in stream if sample[0] < 3)
    every = {(e, s, i) for e in range(3) for s, count in enumerate(counts) for i in range(count)}
    assert whole_epochs == Counter(every)


@pytest.mark.parametrize("counts, batch, window", PLANS)
def test_slots_and_steps_can_be_asked_for_in_any_order(counts, batch, window):
    plan = EpochPlan(3, counts, batch, window)
    whole = [plan.samples(step, 0, batch) for step in range(9)]
    other = pickle.loads(pickle.dumps(EpochPlan(3, counts, batch, window)))
    for step in (8, 0, 5, 5, 2):
        for ranks in (d for d in range(1, batch + 1) if batch % d == 0):
            share = batch // ranks
            parts = [other.samples(step, r * share, (r + 1) * share) for r in reversed(range(ranks))]
            assert [sample for part in reversed(parts) for sample in part] == whole[step]


def test_the_number_of_lanes():
    def lanes(shards, batch):
        return EpochPlan(0, [9] * shards, batch, 4).lanes

    assert lanes(1, 8) == 1 and lanes(5, 8) == 4 and lanes(7, 21) == 7 and lanes(3, 7) == 1
    assert lanes(40_000, 32_800) == 100 and lanes(500, 1024) == 128 and lanes(500, 127) == 127


def test_the_seed_and_the_epoch_change_the_order_and_so_does_the_window():
    def order(seed, step, window=50):
        return [sample[1:] for sample in EpochPlan(seed, [30, 30, 40], 100, window).samples(step, 0, 100)]

    assert order(0, 0) == order(0, 0)
    others = [order(1, 0), order(0, 1), order(0, 0, 7)]
    assert all(order(0, 0) != other for other in others)
    assert all(sorted(order(0, 0)) == sorted(other) for other in others)
    moved = np.mean([a != b for a, b in zip(order(0, 0), sorted(order(0, 0)), strict=True)])
    assert moved > 0.9


def test_fingerprints():
    base = (0, [3, 4], 4, 2)
    prints = [EpochPlan(*base), EpochPlan(1, *base[1:]), EpochPlan(0, [4, 3], 4, 2), EpochPlan(0, [3, 4], 2, 2)]
    prints += [EpochPlan(0, [3, 4], 4, 3)]
    assert len({plan.fingerprint() for plan in prints}) == 5
    assert EpochPlan(*base).fingerprint() == prints[0].fingerprint()


def test_a_plan_of_400_million_samples_is_cheap():
    began = time.perf_counter()
    plan = EpochPlan(0, [10_000] * 40_000, 32_800, 16_384)
    for step in (0, 1, 400_000, 12_195 * 31):
        assert len(plan.samples(step, 410 * 7, 410 * 8)) == 410
    assert time.perf_counter() - began < 2
    assert plan.lanes_of(410 * 7, 410 * 8) <= 3  # so a rank reads few tars at a time
    assert plan.epochs_at(12_195) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("counts, batch, window", [([], 4, 4), ([3, 0], 4, 4), ([3], 0, 4), ([3], 4, 0)])
def test_nothing_to_plan(counts, batch, window):
    with pytest.raises(DataError, match="at least 1"):
        EpochPlan(0, counts, batch, window)


def test_slots_outside_the_batch():
    plan = EpochPlan(0, [10], 4, 4)
    for wrong in [(0, 0, 5), (0, 3, 2), (-1, 0, 4), (0, -1, 2)]:
        with pytest.raises(IndexError):
            plan.samples(*wrong)


def test_augmentation_streams_do_not_repeat():
    places = [(s, e, h, i) for s in range(2) for e in range(3) for h in range(3) for i in range(3)]
    draws = {tuple(augmentation_generator(*place).integers(0, 2**62, 3)) for place in places}
    assert len(draws) == len(places)
    assert augmentation_generator(1, 2, 3, 4).random() == augmentation_generator(1, 2, 3, 4).random()


# ------------------------------------------------------------------------------------------------ the loader


class Cycle:
    """Garbage that only a collection finds; notes which process ended it."""

    def __init__(self, file: Path):
        self.file, self.itself = file, self

    def __del__(self):
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_garbage_ends_before_loader_processes_start(data, tmp_path):
    """A process group that is ended in a forked process waits there without end for threads it does not have."""
    folder, shards = data
    loader = make_loader(folder, shards, workers=1)
    gc.disable()
    try:
        Cycle(tmp_path / "ended")
        found = collect(loader, 0, 1)
    finally:
        gc.enable()
    assert len(found) == 1
    assert (tmp_path / "ended").read_text() == f"{os.getpid()}\n"


COUNTS = [17, 9, 14, 20]


def config(**changes) -> RunConfig:
    settings = {"deepspeed_config": "x", "shards": "x", "labels": "x", "output_dir": "x", "num_positives": 3}
    return RunConfig(**{**settings, "workers": 0, "shuffle_window": 6, "prefetch": 2, **changes})


def make_loader(folder, shards, rank=0, world_size=1, batch=8, allowed=1.0, heads=("labels",), **changes):
    settings = config(max_skipped_fraction=allowed, **changes)
    table = build_shard_table(
        shards, [folder / head for head in heads], settings.num_positives, allowed, None, Topology.single()
    )
    plan = EpochPlan(5, table.counts, batch, settings.shuffle_window)
    topology = Topology(rank, world_size, rank, world_size, torch.device("cpu"))
    return ImageLabelLoader(settings, table, plan, image_size=24, topology=topology)


def collect(loader, start, stop):
    """Each batch as (images, labels, keys)."""
    try:
        return [(b.images_BCHH.clone(), b.labels_BL.clone(), b.keys) for b in loader.iterate(start, stop)]
    finally:
        loader.close()


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (images, labels, keys), (images2, labels2, keys2) in zip(found, expected, strict=True):
        assert keys == keys2 and torch.equal(labels, labels2) and torch.equal(images, images2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, make_shards(folder, COUNTS)


@pytest.fixture(scope="module")
def reference(data):
    """Twelve steps of 8 images: one rank, no loader processes. More than an epoch of 60 images."""
    return collect(make_loader(*data), 0, 12)


def test_batches_are_what_they_say(data, reference):
    seen = Counter()
    for images, labels, keys in reference:
        assert images.dtype == torch.uint8 and images.shape == (8, 3, 24, 24) and images.is_contiguous()
        assert labels.dtype == torch.int64 and labels.shape == (8, 3)
        assert labels.tolist() == [labels_of(key).tolist() for key in keys]
        seen.update(keys)
    assert set(seen.values()) <= {1, 2} and len(seen) == sum(COUNTS)
    # The image belongs to the key: its mean colour is near that of the picture it was cut from.
    differences = [
        np.abs(image.numpy().mean((1, 2)) - picture(int(key)).mean((0, 1))).max()
        for images, _, keys in reference
        for image, key in zip(images, keys, strict=True)
    ]
    assert np.median(differences) < 10


@pytest.mark.parametrize("world_size, workers", [(1, 2), (2, 0), (2, 2), (4, 0)])
def test_ranks_and_loader_processes_change_nothing(data, reference, world_size, workers):
    ranks = [
        collect(make_loader(*data, rank=rank, world_size=world_size, workers=workers), 0, 12)
        for rank in range(world_size)
    ]
    joined = [
        (torch.cat([b[0] for b in step]), torch.cat([b[1] for b in step]), tuple(key for b in step for key in b[2]))
        for step in zip(*ranks, strict=True)
    ]
    assert_same(joined, reference)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_the_first(data, reference, workers):
    assert_same(collect(make_loader(*data, workers=workers), 5, 10), reference[5:10])


def test_a_loader_can_be_used_again_even_after_half_a_pass(data, reference):
    loader = make_loader(*data, workers=2)
    half = loader.iterate(0, 12)
    for _ in range(3):
        next(half)
    half.close()
    first = [(b.images_BCHH, b.labels_BL, b.keys) for b in loader.iterate(2, 6)]
    assert_same(first, reference[2:6])
    assert_same(collect(loader, 6, 12), reference[6:12])
    assert list(loader.iterate(3, 3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_several_pieces_are_the_same(data, reference, monkeypatch, workers):
    monkeypatch.setattr(loader_module, "IMAGES_PER_PIECE", 3)
    assert_same(collect(make_loader(*data, workers=workers), 0, 12), reference)


def test_reading_leaves_the_global_random_state_alone(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(make_loader(*data, workers=1), 0, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_between_epochs_and_can_be_off(data):
    def images_of(steps, **changes):
        found = {}
        for images, _, keys in collect(make_loader(*data, **changes), 0, steps):
            for image, key in zip(images, keys, strict=True):
                found.setdefault(key, []).append(image)
        return [images for images in found.values() if len(images) == 2]

    assert any(not torch.equal(*pair) for pair in images_of(16))
    plain = images_of(16, crop_scale_min=1.0, flip=False)
    assert plain and sum(torch.equal(*pair) for pair in plain) >= len(plain) * 0.2


def test_fewer_labels_than_stored_and_fewer_stored_than_wanted(tmp_path):
    shards = make_shards(tmp_path, [4])
    ((_, labels, keys),) = collect(make_loader(tmp_path, shards, batch=4, num_positives=2), 0, 1)
    assert labels.tolist() == [labels_of(key)[:2].tolist() for key in keys]
    rows = np.array([[1, 2, 3], [4, -1, -1], [-1, -1, -1], [5, 6, -1]])
    info = build_shard_table(shards, [tmp_path / "labels"], 3, 0.0, None, Topology.single()).labels_infos[0]
    names = [f"00000{i:04d}" for i in range(4)]
    write_label_shard(label_path(tmp_path / "labels", "00000"), names, rows, np.zeros((4, 3)), info)
    loader = make_loader(tmp_path, shards, batch=4)
    ((_, labels, keys),) = collect(loader, 0, 1)
    assert labels.tolist() == [rows[names.index(key)].tolist() for key in keys] and NO_LABEL in labels
    # One without any is used, and said: docs/clustering.md tells what it is to the loss.
    assert loader.ledger.num_skipped == 0
    (told,) = loader._dataset.table.unused()
    assert told.startswith("1 images have an empty list of labels")


def test_drawn_labels_are_a_function_of_seed_epoch_and_sample(data, reference, monkeypatch):
    """The same for every number of ranks and loader processes and size of piece; images stay those of a run without."""
    drawn = collect(make_loader(*data, positives_drawn=2), 0, 12)
    for (images, labels, keys), (images2, labels2, keys2) in zip(drawn, reference, strict=True):
        assert keys == keys2 and torch.equal(images, images2)
        assert labels.shape == (8, 2)
        for two, three in zip(labels.tolist(), labels2.tolist(), strict=True):
            assert two in [three[:2], three[1:], three[::2]]
    monkeypatch.setattr(loader_module, "IMAGES_PER_PIECE", 3)
    halves = [collect(make_loader(*data, rank=r, world_size=2, workers=1, positives_drawn=2), 0, 12) for r in range(2)]
    joined = [torch.cat([first[1], second[1]]) for first, second in zip(*halves, strict=True)]
    assert all(torch.equal(ours, labels) for ours, (_, labels, _) in zip(joined, drawn, strict=True))
    visits = {}
    for _, labels, keys in drawn:
        for key, row in zip(keys, labels.tolist(), strict=True):
            visits.setdefault(key, []).append(row)
    twice = [rows for rows in visits.values() if len(rows) == 2]
    assert 0 < sum(first == second for first, second in twice) < len(twice)  # another draw in another epoch
    assert_same(collect(make_loader(*data, positives_drawn=3), 0, 12), reference)


def test_positives_are_drawn_uniformly_and_keep_their_order():
    labels = np.array([40, 7, 23, 31, 2, NO_LABEL, NO_LABEL], np.int32)
    draws = Counter()
    for epoch in range(2):
        for index in range(3000):
            draws[tuple(draw_positives(labels, 2, positives_generator(1, epoch, 5, index)).tolist())] += 1
    pairs = {(int(labels[i]), int(labels[j])) for i in range(5) for j in range(i + 1, 5)}
    assert set(draws) == pairs  # distinct, nearest first, no padding
    chi_squared = sum((count - 600) ** 2 / 600 for count in draws.values())
    assert chi_squared < 27.9  # 0.1 % point at 9 degrees of freedom


@pytest.mark.parametrize("count, expected", [(5, [40, 7, 23, 31, 2]), (6, [40, 7, 23, 31, 2, NO_LABEL])])
def test_too_few_labels_to_draw_from_are_all_taken(count, expected):
    labels = np.array([40, 7, 23, 31, 2, NO_LABEL, NO_LABEL], np.int32)
    assert draw_positives(labels, count, positives_generator(0, 0, 0, 0)).tolist() == expected


def test_draws_among_labels_repeat_and_differ_from_the_augmentations():
    place = (1, 2, 3, 4)
    assert positives_generator(*place).random() == positives_generator(*place).random()
    assert positives_generator(*place).random() != augmentation_generator(*place).random()


@pytest.mark.parametrize("drawn", [None, 2])
def test_labels_of_two_heads_stand_in_their_columns(data, reference, drawn):
    folder, shards = data
    for shard, count in enumerate(COUNTS):  # the same keys in the other order: labels of the key plus one
        keys = [f"{shard:05d}{i:04d}" for i in range(count)]
        rows = np.array([(labels_of(key) + 1) % 50 for key in keys])
        info = LabelsInfo(50, 3, "text", "builtin:toy")
        write_label_shard(label_path(folder / "text", f"{shard:05d}"), keys, rows, np.zeros(rows.shape), info)
    found = collect(make_loader(folder, shards, heads=("labels", "text"), positives_drawn=drawn), 0, 12)
    draws = set()
    for (images, labels, keys), (images2, labels2, keys2) in zip(found, reference, strict=True):
        assert keys == keys2 and torch.equal(images, images2)
        first, second = ImageLabelBatch(images, labels, keys).labels_of_heads(2)
        if drawn is None:
            assert torch.equal(first, labels2) and torch.equal(second, (labels2 + 1) % 50)
            continue
        for one, two, three in zip(first.tolist(), second.tolist(), labels2.tolist(), strict=True):
            places = tuple(tuple(three.index(label) for label in row) for row in (one, [(x - 1) % 50 for x in two]))
            assert all(len(pair) == 2 and pair[0] < pair[1] for pair in places)
            draws.add(places)
    assert drawn is None or len(draws) == 9  # each head draws for itself


def test_columns_that_cannot_be_shared_out(reference):
    images, labels, keys = reference[0]
    with pytest.raises(ValueError, match="3 label columns are not a multiple of 2 heads"):
        ImageLabelBatch(images, labels, keys).labels_of_heads(2)


def test_the_global_batch_must_be_divisible(data):
    with pytest.raises(ConfigError, match="global batch of 8 cannot be split over 3 ranks"):
        make_loader(*data, world_size=3)


def test_reading_with_little_memory_and_few_files_gives_the_same(data, monkeypatch):
    monkeypatch.setattr("mlcd_ds.data.shards.MAX_OPEN_FILES", 1)
    monkeypatch.setattr("mlcd_ds.data.shards.KEPT_SAMPLES", 0)
    folder, shards = data
    table = build_shard_table(shards, [folder / "labels"], 3, 0.0, None, Topology.single())
    reader, other = ShardReader(table, memory_samples=1), ShardReader(table, memory_samples=10**6)
    assert not table.kept
    for shard, index in [(0, 0), (1, 8), (0, 16), (3, 2), (1, 0), (2, 13)]:
        one, two = (r.image_bytes(r.contents(shard), index) for r in (reader, other))
        assert one == two == encode(picture(shard * 10_000 + index))
    assert len(reader._files) == len(reader._contents) == 1 and len(other._contents) == 4
    reader.close()
    other.close()


# ------------------------------------------------------------------------------------------------ what cannot be used

BAD = {
    "000000003": b"",
    "000000005": b"this is text",
    "000010002": encode(picture(1))[:-300],
    "000010007": encode(Image.new("1", (9000, 9000)), "PNG"),
}
REASONS = {"empty": 1, "not_an_image": 1, "broken": 1, "too_large": 1, "no_label": 2}


@pytest.fixture
def damaged(tmp_path):
    shards = make_shards(tmp_path, [20, 20], BAD)
    write_labels(tmp_path / "labels", "00001", [f"00001{i:04d}" for i in range(20) if i not in (4, 9)])
    return tmp_path, shards


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_keep_their_slot_and_are_counted(damaged, workers):
    folder, shards = damaged
    loader = make_loader(folder, shards, workers=workers)
    batches = collect(loader, 0, 5)  # exactly one epoch
    unusable = {*BAD, "000010004", "000010009"}
    good = {f"{shard:05d}{i:04d}" for shard in range(2) for i in range(20)} - unusable
    empty = 0
    for images, labels, keys in batches:
        for image, row, key in zip(images, labels, keys, strict=True):
            assert (key == "") == (row == NO_IMAGE).all().item() == (row == NO_IMAGE).any().item()
            if key == "":
                assert not image.any()
                empty += 1
    assert empty == 6
    assert sorted(key for _, _, keys in batches for key in keys if key) == sorted(good)
    assert loader.ledger.skipped == REASONS and loader.ledger.decoded == 34 and loader.ledger.read == 40
    assert {shard: loader.ledger.decoded_of[shard] + loader.ledger.skipped_of[shard] for shard in range(2)} == {
        0: 20,
        1: 20,
    }
    assert dict(loader.ledger.skipped_of) == {0: 2, 1: 4}
    assert loader.count_skipped(final=False) == (34, REASONS)
    assert {name.split(":")[0].split("/")[1] for name in loader.ledger.names} == unusable
    assert any(name.startswith("00001/000010007: too_large: 9000 x 9000 pixels") for name in loader.ledger.names)


def test_every_shards_sums_reconcile_with_the_index(data):
    loader = make_loader(*data, batch=6)
    collect(loader, 0, 20)  # 120 images: two epochs of 60
    ledger = loader.ledger
    sums = {shard: ledger.decoded_of[shard] + ledger.skipped_of[shard] for shard in range(len(COUNTS))}
    assert sums == {shard: 2 * count for shard, count in enumerate(COUNTS)}
    assert ledger.read == 120 and ledger.num_skipped == 0


def test_names_of_skipped_samples_are_written_as_they_come(damaged, monkeypatch):
    folder, shards = damaged
    settings = config(max_skipped_fraction=1.0)
    table = build_shard_table(shards, [folder / "labels"], 3, 1.0, None, Topology.single())
    plan = EpochPlan(5, table.counts, 8, 6)

    def pass_over(start, stop, final=False):
        loader = ImageLabelLoader(settings, table, plan, 24, Topology.single(), folder / "run" / "skipped")
        collect(loader, start, stop)
        loader.count_skipped(final)
        return loader.ledger.names

    names = pass_over(0, 3) + pass_over(3, 5, final=True)  # as a resumed run would
    lines = (folder / "run" / "skipped" / "rank_00000.txt").read_text().splitlines()
    assert lines == [" ".join(name.split()) for name in names] and len(lines) == 6
    sums = json.loads((folder / "run" / "skipped" / "by_shard.json").read_text())
    assert [row["images"] for row in sums.values()] == [20, 20] and list(sums) == ["00000", "00001"]
    assert (
        sum(row["decoded"] + row["skipped"] for row in sums.values()) == 16
    )  # two steps of 8, no totals were taken over
    monkeypatch.setattr(loader_module, "MAX_NAMES", 8)
    pass_over(0, 5)
    pass_over(0, 5)
    lines = (folder / "run" / "skipped" / "rank_00000.txt").read_text().splitlines()
    assert len(lines) == 9 and lines[8].startswith("... more than 8")


def test_totals_go_on_at_another_number_of_ranks_and_reconcile_with_the_index(damaged, tmp_path):
    """Two ranks up to the third step, with a batch in advance that does not count; then one; then four. Two epochs."""
    folder, shards = damaged
    settings = config(max_skipped_fraction=1.0)
    table = build_shard_table(shards, [folder / "labels"], 3, 1.0, None, Topology.single())

    def part(topology, start, stop, taken_over, ends):
        loader = ImageLabelLoader(settings, table, EpochPlan(5, table.counts, 8, 6), 24, topology, tmp_path / "skipped")
        if taken_over is not None:
            loader.go_on_from(taken_over)
        batches = loader.iterate(start, 10, ahead=1)
        for _ in range(stop - start + (not ends)):  # one more than is used
            next(batches)
        if ends:
            assert next(batches, None) is None
        return loader.totals(), loader.count_skipped(final=ends)

    totals, decoded, skips = None, [], []
    for ranks, start, stop in ((2, 0, 3), (1, 3, 4), (4, 4, 10)):
        found = run_ranks(ranks, partial(part, start=start, stop=stop, taken_over=totals, ends=stop == 10))
        assert all(own == found[0] for own in found)
        totals = json.loads(json.dumps(found[0][0]))
        decoded.append(found[0][1][0])
        skips.append(found[0][1][1])
    assert [own + skip.total() for own, skip in zip(decoded, skips, strict=True)] == [24, 32, 80]
    assert skips[-1] == {reason: 2 * count for reason, count in REASONS.items()}
    assert [sum(counts) for counts in totals["shards"].values()] == [2 * count for count in table.counts]
    by_shard = json.loads((tmp_path / "skipped" / "by_shard.json").read_text())
    assert [row["decoded"] + row["skipped"] for row in by_shard.values()] == [40, 40]
    assert by_shard["00001"]["no_label"] == 4 and by_shard["00000"]["empty"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(damaged, workers):
    folder, shards = damaged
    loader = make_loader(folder, shards, allowed=0.12, workers=workers)
    collect(loader, 0, 5)
    assert loader.check_skipped(final=False) == (34, 6)  # too few to judge
    with pytest.raises(DataError) as caught:
        loader.check_skipped(final=True)
    message = str(caught.value)
    assert "6 of 40 samples" in message and "2 no_label" in message and "1 broken" in message
    assert "--max_skipped_fraction 0.12" in message and "0000" in message and "Traceback" not in message
    loader = make_loader(folder, shards, allowed=0.15)
    collect(loader, 0, 5)
    assert loader.check_skipped(final=True) == (34, 6)


def test_they_stop_it_as_soon_as_there_are_enough_to_judge(damaged, monkeypatch):
    monkeypatch.setattr(loader_module, "MIN_SAMPLES_TO_JUDGE", 16)
    folder, shards = damaged
    loader = make_loader(folder, shards, allowed=0.06)
    collect(loader, 0, 5)
    with pytest.raises(DataError):
        loader.check_skipped(final=False)


# ------------------------------------------------------------------------------------------------ what breaks on the way


def cut_in_the_second_image(path):
    with open(path, "r+b") as file:  # noqa: PTH123
        file.truncate(index_tar(path).members["000010001"]["jpg"][0] + 10)


def remove(path):
    Path(path).unlink()


def page(path):
    Path(path).write_text("<html>gone</html>" * 60)


def nothing(path):
    Path(path).write_bytes(b"")


LOSSES = [
    (cut_in_the_second_image, "damaged_tar", 9, r"00001.tar (is cut inside a member: '000010001.jpg'|became shorter)"),
    (remove, "missing_tar", 10, r"the tar .*00001.tar"),
    (page, "damaged_tar", 10, r"00001.tar (is not a tar file|became shorter)"),
    (nothing, "damaged_tar", 10, r"00001.tar (is empty|became shorter)"),
]


@pytest.mark.parametrize("workers, kept", [(0, 0), (0, 100), (2, 0)])
@pytest.mark.parametrize("lose, reason, lost, message", LOSSES)
def test_a_tar_that_breaks_or_vanishes_during_the_run_is_counted(
    tmp_path, monkeypatch, capsys, lose, reason, lost, message, workers, kept
):
    """Whatever comes before the damage is used, the rest keeps its slots, the tar is named once, the limit holds."""
    monkeypatch.setattr("mlcd_ds.data.shards.KEPT_SAMPLES", kept)
    shards = make_shards(tmp_path, [30, 10])
    whole = collect(make_loader(tmp_path, shards), 0, 5)
    loader = make_loader(tmp_path, shards, workers=workers, allowed=0.2)
    lose(shards[1])
    found = collect(loader, 0, 5)
    gone = 0
    for (images, labels, keys), (images2, labels2, keys2) in zip(found, whole, strict=True):
        for row, key in enumerate(keys):
            assert key in ("", keys2[row])
            gone += key == ""
            assert (labels[row] == NO_IMAGE).all() if key == "" else torch.equal(labels[row], labels2[row])
            assert torch.equal(images[row], images2[row] if key else torch.zeros_like(images[row]))
    assert gone == lost
    assert loader.ledger.skips == {(1, reason): lost} and loader.ledger.read == 40
    assert len(loader.ledger.names) == 1 and re.search(f"^00001: {reason}: .*{message}", loader.ledger.names[0])
    assert capsys.readouterr().out.count("WARNING: the images of a tar are lost, skipped and counted: 00001") == 1
    with pytest.raises(DataError, match=f"{lost} of 40 samples could not be used .{lost} {reason}.*{message}"):
        loader.check_skipped(final=True)


@pytest.mark.parametrize("lose, reason, lost, message", LOSSES)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_tar_that_is_damaged_or_missing_at_the_start_is_counted_up_to_the_limit(
    tmp_path, lose, reason, lost, message, indexed
):
    """The order of all others is that of before, so that a run goes on from its checkpoint."""
    shards = make_shards(tmp_path, [30, 10])
    one, labels = Topology.single(), [tmp_path / "labels"]
    index = tmp_path / "run" / "index" if indexed else None
    before = build_shard_table(shards, labels, 3, 0.0, None, one, index_folder=index)
    whole = collect(make_loader(tmp_path, shards), 0, 5)
    lose(shards[1])

    def table(allowed, missing=True):
        return build_shard_table(shards, labels, 3, allowed, None, one, index_folder=index, allow_missing=missing)

    with pytest.raises(
        DataError, match=f"{message}.*{lost} of 40 images are lost so, more than --max_skipped_fraction 0.2"
    ):
        table(0.2)
    if reason == "missing_tar":
        with pytest.raises(DataError, match="00001.tar.*Fetch it, or go on without it by --allow_missing_shards"):
            table(1.0, missing=False)
    now = table(0.25)
    assert now.fingerprint() == before.fingerprint() and now.quarantined[0][:2] == (1, lost)
    assert any(re.match(f"{lost} images are lost in 1 damaged or missing tars.*{message}", t) for t in now.unused())
    loader = ImageLabelLoader(config(), now, EpochPlan(5, now.counts, 8, 6), 24, one)
    found = collect(loader, 0, 5)
    for (_, _, keys), (_, _, keys2) in zip(found, whole, strict=True):
        assert all(key in ("", key2) for key, key2 in zip(keys, keys2, strict=True))
    assert loader.ledger.skips == {(1, reason): lost} and loader.ledger.read == 40


def swapped(folder):
    """A tar of eight images of one size, labelled, and the bytes of one with the same keys and the first two swapped."""
    encoded = [encode(picture(i)) for i in range(8)]
    images = [image + bytes(max(map(len, encoded)) - len(image)) for image in encoded]
    keys = [f"{i:09d}" for i in range(8)]
    write_labels(folder / "labels", "00000", keys)
    for path, own in ((folder / "00000.tar", images), (folder / "other.tar", [images[1], images[0], *images[2:]])):
        tars.write_tar(path, [(key, {"jpg": image}) for key, image in zip(keys, own, strict=True)])
    return folder / "00000.tar", (folder / "other.tar").read_bytes()


@pytest.mark.parametrize(
    "when", ["renamed", "written over", "written over while it is open", "written over by its own"]
)
def test_a_tar_that_becomes_another_whole_one_is_refused(tmp_path, when):
    """The same keys at the same places: nothing but the time of change tells that images have other labels."""
    path, other = swapped(tmp_path)
    loader = make_loader(tmp_path, [str(path)], batch=4)
    steps = loader.iterate(0, 2)
    if "open" in when:
        next(steps)
    if when == "renamed":
        (tmp_path / "other.tar").replace(path)
    else:
        path.write_bytes(path.read_bytes() if "own" in when else other)
    os.utime(path, ns=(0, 10**18))
    with pytest.raises(
        DataError, match="00000.tar became another while the run was reading it: it had .*--resume auto"
    ):
        list(steps)
    assert loader.ledger.num_skipped == 0


def test_a_tar_that_is_fetched_again_may_be_the_same(tmp_path):
    path, _ = swapped(tmp_path)
    whole = path.read_bytes()
    table = build_shard_table(
        [f"local://{path}"], [tmp_path / "labels"], 3, 0.0, str(tmp_path / "cache"), Topology.single()
    )
    (cached,) = (tmp_path / "cache").rglob("*.tar")
    reader = ShardReader(table, 100)
    for turn, data in enumerate((whole, whole, whole[: len(whole) // 2])):
        cached.write_bytes(data)
        os.utime(cached, ns=(0, turn))
        assert reader.image_bytes(reader.contents(0), 0)[:300] == encode(picture(0))[:300]
    with pytest.raises(ImageError, match="is cut"):
        reader.image_bytes(reader.contents(0), 7)
    cached.write_bytes(whole[512 * 3 :][: len(whole) // 2])  # what is left lies elsewhere, so it may be another tar's
    with pytest.raises(ImageError, match="00000.tar"):
        reader.image_bytes(reader.contents(0), 1)
    reader.close()


def failing_reads(monkeypatch, name, number):
    """os.open or os.pread of 00001.tar fails."""
    function = getattr(os, name)

    def call(what, *arguments, **options):
        path = what if name == "open" else Path(f"/proc/self/fd/{what}").readlink()
        if str(path).endswith("00001.tar"):
            raise OSError(number, os.strerror(number))
        return function(what, *arguments, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("kept", [0, 100])
@pytest.mark.parametrize("name, number", [("open", errno.EMFILE), ("open", errno.EACCES), ("pread", errno.ESTALE)])
def test_what_the_machine_lacks_ends_the_run_and_is_never_a_skip(tmp_path, monkeypatch, name, number, kept):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("mlcd_ds.data.shards.KEPT_SAMPLES", kept)
    shards = make_shards(tmp_path, [30, 10])
    loader = make_loader(tmp_path, shards)
    failing_reads(monkeypatch, name, number)
    cure = {errno.EMFILE: "ulimit -n", errno.EACCES: "may not read it", errno.ESTALE: "file server"}[number]
    with pytest.raises(DataError, match=f"00001.tar: {os.strerror(number)}.*{cure}"):
        collect(loader, 0, 5)
    assert loader.ledger.num_skipped == 0
    with pytest.raises(DataError, match=f"00001.tar: {os.strerror(number)}.*{cure}"):
        build_shard_table(shards, [tmp_path / "labels"], 3, 1.0, None, Topology.single(), allow_missing=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["decode_crop", "os.pread"])
def test_lack_of_memory_ends_the_run_and_is_never_a_skip(tmp_path, monkeypatch, workers, where):
    def no_memory(*arguments, **options):
        raise MemoryError("cannot allocate 7 GiB")

    loader = make_loader(
        tmp_path, make_shards(tmp_path, [8], {"000000003": encode(picture(3), "PNG")}), workers=workers
    )
    if where == "decode_crop":
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_memory)
        words = "00000/000000003: no memory to decode an image"
    else:
        monkeypatch.setattr(os, "pread", no_memory)
        words = "no memory to read the images of step 1 .cannot allocate 7 GiB"
    with pytest.raises(DataError, match=f"{words}.*fewer --workers"):
        collect(loader, 0, 1)
    assert loader.ledger.num_skipped == 0


def test_a_fault_in_a_loader_process_keeps_its_text(data, monkeypatch):
    def boom(*arguments):
        raise RuntimeError("a DataLoader worker (pid 1) is killed, says this fault of ours")

    monkeypatch.setattr(loader_module, "decode_random_resized_crop", boom)
    with pytest.raises(
        RuntimeError, match="Caught RuntimeError in DataLoader worker process 0(.|\n)*says this fault of ours"
    ):
        collect(make_loader(*data, workers=1), 0, 1)


def test_a_loader_process_that_cannot_hand_over_its_batch_ends_the_run_at_once(data, monkeypatch, capfd):
    """torch hands tensors over as open files, in a thread whose exceptions nobody waits for."""

    def refused(storage):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refused)
    began = time.monotonic()
    with pytest.raises(DataError, match="a loader process died .* while step 1 was waited for"):
        collect(make_loader(*data, workers=1), 0, 2)
    assert time.monotonic() - began < 60
    assert "cannot hand over what it has read: OSError: [Errno 24] Too many open files" in capfd.readouterr().err


def test_too_many_open_files_of_batches_are_told_with_the_cure(data):
    def arriving():
        raise RuntimeError("Too many open files. Communication with the workers is no longer possible. Please increase")
        yield

    with pytest.raises(DataError, match="too many open files while step 4 was waited for.*ulimit -n"):
        make_loader(*data)._next(arriving(), 3)


@pytest.mark.parametrize("name", ["open", "pread"])
def test_a_bad_disk_is_waited_for_once_and_its_images_are_counted(tmp_path, monkeypatch, name):
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    loader = make_loader(tmp_path, make_shards(tmp_path, [30, 10]))
    failing_reads(monkeypatch, name, errno.EIO)
    collect(loader, 0, 5)
    assert loader.ledger.skips == {(1, "damaged_tar"): 10}
    assert "Input/output error" in loader.ledger.names[0]
    assert waits == list(storage.RETRY_SECONDS)


def test_a_dry_run_on_captions_counts_what_is_there_and_takes_what_the_run_takes(tmp_path):
    samples = [(f"{i:09d}", {"jpg": encode(picture(i)), "txt": b"a word"}) for i in range(6)]
    for name in ("0", "1", "2"):
        tars.write_tar(tmp_path / f"{name}.tar", [(f"{name}{key}", parts) for key, parts in samples])
    write_index(index_tar(tmp_path / "1.tar"))
    shards = [str(tmp_path / f"{name}.tar") for name in "012"]
    assert train.count_images(config(), shards) == (18, ())
    os.truncate(shards[1], 4000)
    remove(shards[2])
    with pytest.raises(DataError, match="2.tar.*Fetch it, or go on without it by --allow_missing_shards"):
        train.count_images(config(), shards)
    count, (told,) = train.count_images(config(allow_missing_shards=True), shards)
    assert count == 12  # the index of the cut one tells of all six
    assert told.startswith("2 tars are damaged or missing, what no index tells of them is not counted. E.g. the tar ")
    with pytest.raises(
        DataError, match="2.tar.* No index of before tells which images it held: take it out of --shards"
    ):
        build_shard_table(shards, [], 1, 1.0, None, Topology.single(), captions=True, allow_missing=True)
    assert len(list(tmp_path.iterdir())) == 2 + 3 + 1


def test_a_lost_tar_is_judged_by_its_share_of_an_epoch(tmp_path, monkeypatch):
    """It may be one of few that are read at the time."""
    monkeypatch.setattr(loader_module, "MIN_SAMPLES_TO_JUDGE", 8)
    shards = make_shards(tmp_path, [5, 200])
    loader = make_loader(tmp_path, shards, allowed=0.03)
    remove(shards[0])
    plan = loader._dataset.plan
    of_first = [sum(shard == 0 for _, shard, _ in plan.samples(step, 0, 8)) for step in range(26)]
    until = of_first.index(max(of_first)) + 1
    collect(loader, until - 1, until)
    assert loader.ledger.skipped["missing_tar"] > 0.1 * 8
    assert loader.check_skipped(final=False)[1] == loader.ledger.num_skipped


def test_a_remote_tar_without_a_place_to_fetch_it_to_is_no_missing_tar(tmp_path):
    shards = [*make_shards(tmp_path, [30]), "s3://bucket/00001.tar"]
    with pytest.raises(DataError, match="^s3://bucket/00001.tar is remote: .*--shard_cache FOLDER$"):
        build_shard_table(shards, [tmp_path / "labels"], 3, 1.0, None, Topology.single(), allow_missing=True)


def test_a_lost_tar_may_come_early_in_every_epoch(tmp_path, monkeypatch):
    """Its images are lost once in each epoch begun, however little of the last one has been read."""
    monkeypatch.setattr(loader_module, "MIN_SAMPLES_TO_JUDGE", 8)
    loader = make_loader(tmp_path, make_shards(tmp_path, [4, 36]), allowed=0.1)
    loader.ledger.decoded_of.update({1: 40})
    loader.ledger.skips.update({(0, "missing_tar"): 8})  # both times, in 48 of 80 samples
    assert loader.check_skipped(final=False) == (40, 8)
    loader.ledger.skips[0, "missing_tar"] += 1
    with pytest.raises(DataError, match=r"9 of 49 samples could not be used .9 missing_tar., .* allows. Mend"):
        loader.check_skipped(final=False)


def test_what_rots_late_is_judged_by_itself(tmp_path, monkeypatch):
    """However much was good before; a resume starts anew from the sums it goes on from."""
    monkeypatch.setattr(loader_module, "WINDOW_SAMPLES", 100)
    shards = make_shards(tmp_path, [4, 36])

    def more(loader, good, **skips):
        loader.ledger.decoded_of[1] += good
        loader.ledger.skips.update({(0, reason): count for reason, count in skips.items()})
        return loader.check_skipped(final=False)

    loader = make_loader(tmp_path, shards, allowed=0.05)
    assert more(loader, 4000) == (4000, 0)
    for turn in range(1, 5):
        assert more(loader, 47, broken=2, no_label=1) == (4000 + 47 * turn, 3 * turn)  # 4%
    assert more(loader, 96, broken=4) == (4284, 16)
    totals = loader.totals()
    with pytest.raises(
        DataError,
        match=r"20 of 4350 samples could not be used, 8 of the last 150 samples .16 broken, 4 no_label., more",
    ):
        more(loader, 46, broken=4)
    loader = make_loader(tmp_path, shards, allowed=0.05)
    loader.go_on_from(totals)
    assert more(loader, 46, broken=4) == (4330, 20)


def test_tars_that_are_lost_late_are_judged_by_their_epoch(tmp_path):
    loader = make_loader(tmp_path, make_shards(tmp_path, [4, 36]), allowed=0.1)

    def read(total, lost):
        loader.ledger.decoded_of[1], loader.ledger.skips[0, "missing_tar"] = total - lost, lost
        return loader.check_skipped(final=False)

    for total, lost in ((4030, 0), (4050, 4), (4070, 4), (4090, 8), (4110, 8), (4119, 12)):  # once in each epoch
        assert read(total, lost) == (total - lost, lost)
    with pytest.raises(
        DataError, match=r"13 of 4120 .*, 5 images of damaged or missing tars among the last 30 samples"
    ):
        read(4120, 13)


def test_names_and_sums_that_cannot_be_written_do_not_end_a_run(tmp_path, capsys):
    shards = make_shards(tmp_path, [8], {"000000000": b"", "000000001": b"x"})
    table = build_shard_table(shards, [tmp_path / "labels"], 3, 0.0, None, Topology.single())
    (tmp_path / "skipped").write_text("in the way")
    plan = EpochPlan(5, table.counts, 8, 6)
    settings = config(max_skipped_fraction=1.0)
    loader = ImageLabelLoader(settings, table, plan, 24, Topology.single(), tmp_path / "skipped")
    collect(loader, 0, 1)
    assert loader.check_skipped(final=True) == (6, 2) and len(loader.ledger.names) == 2
    told = capsys.readouterr().out
    assert "rank_00000.txt cannot be written" in told and "by_shard.json cannot be written" in told


def test_loader_processes_ignore_signals_and_their_death_is_told(data):
    loader = make_loader(*data, workers=1, prefetch=1)
    steps = loader.iterate(0, 10_000)
    next(steps)
    (process,) = loader._loader._iterator._workers
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
    for _ in range(5):
        next(steps)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader process died"):
        for _ in range(50):
            next(steps)
    loader.close()


def leave_in_the_middle(folder, shards):
    steps = make_loader(folder, shards, workers=2).iterate(0, 10_000)
    next(steps)
    sys.exit(7)


@pytest.mark.parametrize("how", ["child", "program"])
def test_a_process_that_ends_in_the_middle_of_a_pass_does_not_wait_for_its_loader_processes(data, how):
    began = time.perf_counter()
    if how == "child":
        process = multiprocessing.get_context("fork").Process(target=leave_in_the_middle, args=data)
        process.start()
        process.join(60)
        code = process.exitcode
        process.kill()
    else:
        tests = str(Path(__file__).parent)
        lines = [f"import sys; sys.path[:0] = [{tests!r}, {str(Path(tests).parent)!r}]", "import test_loader"]
        lines += [f"test_loader.leave_in_the_middle(test_loader.Path({str(data[0])!r}), {data[1]!r})"]
        code = subprocess.run([sys.executable, "-c", "\n".join(lines)], timeout=60).returncode
    assert code == 7 and time.perf_counter() - began < 40
