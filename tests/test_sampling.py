"""Who is drawn: every positive, the others uniformly, the same for every number of shards."""

import math

import pytest
import torch

from mlcd_ds.partition import ClassPartition
from mlcd_ds.sampling import ClassSampler, hash_rows

BUDGETS = ("negatives", "total")
NONE = torch.full((1, 1), -1)


def draw(num_classes, num_shards, labels, *, rate=0.1, seed=0, step=0, budget="negatives"):
    partition = ClassPartition(num_classes, num_shards)
    samplers = [ClassSampler(partition, shard, rate, seed, budget) for shard in range(num_shards)]
    rows = [sampler.draw(labels, step) for sampler in samplers]
    for shard, own in enumerate(rows):
        assert own.diff().gt(0).all(), "sorted and distinct"
        assert len(own) == 0 or (0 <= own[0] and own[-1] < partition.size(shard))
        if num_classes > 1000 and labels.numel() < 1000:  # few uniform labels
            assert len(own) <= samplers[shard].likely_rows(labels.numel())
    return torch.cat([own + partition.start(shard) for shard, own in enumerate(rows)])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("num_classes", [37, 1024, 150_001])
def test_draw_does_not_depend_on_the_number_of_shards(num_classes, budget):
    labels = torch.randint(-1, num_classes, (16, 8), generator=torch.Generator().manual_seed(1))
    whole = draw(num_classes, 1, labels, budget=budget)
    for num_shards in (2, 3, 8, 37):
        assert torch.equal(draw(num_classes, num_shards, labels, budget=budget), whole)


def spread(num_classes, rate):
    return 6 * math.sqrt(num_classes * rate * (1 - rate)) + 1


@pytest.mark.parametrize("rate", [0.0003, 0.05, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("positives", [0, 1000, 40_000])
def test_budgets_mean_what_they_say(rate, positives):
    """Of 50,001 classes: r of the rest beside the positives, or r of all with the positives among them."""
    num_classes = 50_001
    labels = torch.randperm(num_classes, generator=torch.Generator().manual_seed(2))[:positives].view(1, -1)
    for budget, expected in (
        ("negatives", positives + rate * (num_classes - positives)),
        ("total", max(positives, rate * num_classes)),
    ):
        rows = draw(num_classes, 3, labels, rate=rate, budget=budget)
        assert set(labels.flatten().tolist()) <= set(rows.tolist())
        assert abs(len(rows) - expected) <= spread(num_classes, rate), budget
        if budget == "total" and positives > rate * num_classes:
            assert len(rows) == positives


def test_step_and_seed_change_the_draw_and_repeat_it():
    first = draw(5000, 1, NONE)
    assert torch.equal(first, draw(5000, 1, NONE))
    assert not torch.equal(first, draw(5000, 1, NONE, step=1))
    assert not torch.equal(first, draw(5000, 1, NONE, seed=1))


def test_neighbouring_seeds_and_steps_are_not_each_others_draws_shifted():
    first = hash_rows(0, 20_000, seed=5, step=7)
    for seed, step in ((6, 7), (5, 8), (4, 7), (7, 5)):
        other = hash_rows(0, 20_000, seed=seed, step=step)
        # Of 20,000 31-bit numbers two sets share 0.19 by chance.
        assert len(set(first.tolist()) & set(other.tolist())) <= 4


def test_rate_one_takes_every_row():
    for budget in BUDGETS:
        assert torch.equal(draw(100, 3, torch.tensor([[1]]), rate=1.0, budget=budget), torch.arange(100))


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_are_drawn_uniformly(budget):
    """Each non-positive row's count over many steps is binomial; chi-square over rows within 5 sigma."""
    labels, steps, num_classes = torch.tensor([[7]]), 3000, 200
    counts = torch.zeros(num_classes)
    for step in range(steps):
        counts[draw(num_classes, 1, labels, step=step, budget=budget)] += 1
    assert counts[7] == steps
    others = torch.cat([counts[:7], counts[8:]])
    share = 0.1 if budget == "negatives" else 19 / 199
    total = steps * 199 * share
    assert abs(others.sum() - total) < 5 * math.sqrt(total * (1 - share))
    chi_square = ((others - steps * share).square() / (steps * share * (1 - share))).sum().item()
    assert abs(chi_square - 199) < 5 * math.sqrt(2 * 199)


def test_pairs_of_rows_are_drawn_independently():
    """Neighbours and far rows, of one step and of the next, are drawn together as often as chance has it."""
    steps, num_classes = 3000, 200
    drawn = torch.zeros(steps, num_classes)
    for step in range(steps):
        drawn[step, draw(num_classes, 1, NONE, step=step)] = 1
    sigma = math.sqrt(0.01 * 0.99 / steps)
    same_step = (drawn.T @ drawn / steps)[~torch.eye(num_classes, dtype=torch.bool)]
    next_step = drawn[:-1].T @ drawn[1:] / (steps - 1)
    assert ((same_step - 0.01).abs() < 6 * sigma).all()
    assert ((next_step - 0.01).abs() < 6 * sigma).all()


@pytest.mark.parametrize("first", [0, 4_000_000])
def test_hash_has_31_bits_that_look_random(first):
    values = hash_rows(first, first + 100_000, seed=3, step=9)
    assert values.dtype == torch.int32
    assert values.min() >= 0
    assert len(values.unique()) > 99_980
    bits = torch.stack([(values >> bit & 1).float() for bit in range(31)], dim=1)
    assert (bits.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(100_000)
    together = (bits - 0.5).T @ (bits - 0.5) / 100_000
    assert (together - 0.25 * torch.eye(31)).abs().max() < 6 * 0.25 / math.sqrt(100_000)


def test_hash_of_a_row_does_not_depend_on_where_a_piece_begins():
    assert torch.equal(hash_rows(0, 1000, 1, 2)[300:], hash_rows(300, 1000, 1, 2))


def test_a_rate_just_below_one_draws_nearly_every_row():
    for budget in BUDGETS:
        assert len(draw(1000, 1, NONE, rate=0.99999999, budget=budget)) == 1000
