"""Who is drawn: every positive, the rest uniformly, the same for every number of shards."""

import math

import pytest
import torch

from mlcd_ds.partition import ClassPartition
from mlcd_ds.sampling import BLOCK, ClassSampler, hash_rows


def draw(num_classes, num_shards, labels, *, rate=0.1, seed=0, step=0):
    partition = ClassPartition(num_classes, num_shards)
    samplers = [ClassSampler(partition, shard, rate, seed) for shard in range(num_shards)]
    rows = [sampler.draw(labels, step) for sampler in samplers]
    for shard, own in enumerate(rows):
        assert own.diff().gt(0).all(), "sorted and distinct"
        assert len(own) == 0 or (0 <= own[0] and own[-1] < partition.size(shard))
        assert len(own) <= samplers[shard].max_rows(labels.numel())
    return torch.cat([own + partition.start(shard) for shard, own in enumerate(rows)])


@pytest.mark.parametrize("num_classes", [37, BLOCK, 5000])
def test_draw_does_not_depend_on_the_number_of_shards(num_classes):
    labels = torch.randint(-1, num_classes, (16, 8), generator=torch.Generator().manual_seed(1))
    whole = draw(num_classes, 1, labels)
    for num_shards in (2, 3, 8, 37):
        assert torch.equal(draw(num_classes, num_shards, labels), whole)


def test_positives_are_always_drawn_and_count_towards_the_budget():
    labels = torch.tensor([[5, 2000], [-1, 2999]])
    rows = draw(3000, 2, labels)
    assert set(labels.flatten().tolist()) - {-1} <= set(rows.tolist())
    assert len(rows) == 300


@pytest.mark.parametrize("rate", [0.0003, 0.001, 0.05, 0.1, 0.37])
@pytest.mark.parametrize("num_classes", [999, 20_000, 50_001])
def test_total_is_the_rate_however_small_the_share_of_a_block(rate, num_classes):
    rows = draw(num_classes, 3, torch.tensor([[-1]]), rate=rate)
    assert len(rows) == math.floor(rate * num_classes + 0.5)


def test_more_positives_than_budget_are_all_kept():
    labels = torch.arange(0, 500)
    assert torch.equal(draw(BLOCK, 1, labels), labels)


def test_step_and_seed_change_the_draw_and_repeat_it():
    none = torch.full((1, 1), -1)
    first = draw(5000, 1, none)
    assert torch.equal(first, draw(5000, 1, none))
    assert not torch.equal(first, draw(5000, 1, none, step=1))
    assert not torch.equal(first, draw(5000, 1, none, seed=1))


def test_neighbouring_seeds_and_steps_are_not_each_others_draws_shifted():
    rows = torch.arange(2000)
    first = hash_rows(rows, seed=5, step=7)
    for seed, step in ((6, 7), (5, 8), (4, 7), (7, 5)):
        other = hash_rows(rows, seed=seed, step=step)
        assert len(set(first.tolist()) & set(other.tolist())) <= 2


def test_rate_one_takes_every_row():
    assert torch.equal(draw(100, 3, torch.tensor([[1]]), rate=1.0), torch.arange(100))


def test_rows_are_drawn_uniformly():
    """Each non-positive row's count over many steps is binomial; chi-square over rows within 5 sigma."""
    labels, steps, num_classes = torch.tensor([[7]]), 3000, 200
    counts = torch.zeros(num_classes)
    for step in range(steps):
        counts[draw(num_classes, 1, labels, step=step)] += 1
    assert counts[7] == steps
    others = torch.cat([counts[:7], counts[8:]])
    expected = steps * (20 - 1) / (num_classes - 1)
    assert others.sum() == steps * 19
    chi_square = ((others - expected).square() / (expected * (1 - 19 / 199))).sum().item()
    assert abs(chi_square - 198) < 5 * math.sqrt(2 * 198)


def test_pairs_of_rows_are_drawn_independently():
    """Neighbours and far rows are drawn together as often as sampling without replacement says."""
    none, steps, num_classes = torch.tensor([[-1]]), 3000, 200
    drawn = torch.zeros(steps, num_classes)
    for step in range(steps):
        drawn[step, draw(num_classes, 1, none, step=step)] = 1
    both = drawn.T @ drawn / steps
    expected = 20 / 200 * 19 / 199
    sigma = math.sqrt(expected * (1 - expected) / steps)
    off_diagonal = both[~torch.eye(num_classes, dtype=torch.bool)]
    assert ((off_diagonal - expected).abs() < 6 * sigma).all()


def test_hash_has_31_bits_that_look_random():
    values = hash_rows(torch.arange(100_000), seed=3, step=9)
    assert values.min() >= 0
    assert values.max() < 1 << 31
    assert len(values.unique()) > 99_990
    bits = torch.stack([(values >> bit & 1).float().mean() for bit in range(31)])
    assert (bits - 0.5).abs().max() < 5 * 0.5 / math.sqrt(100_000)
