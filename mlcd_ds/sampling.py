"""Which classes take part in a step: every positive of the global batch, and random others (partial FC's sampling).

The draw is a function of (seed, step, global block of classes): classes are cut in blocks of BLOCK consecutive rows, and
in each block the rows with the smallest hash of (seed, step, row) join the positives until the block's share is there
(more, if the positives alone are more). The blocks' shares are whole numbers that sum to r * K, rounded. A shard that
holds a part of a block draws the whole block and keeps its part, so neither the number of ranks nor the borders of the
shards change who is drawn.

c classes of this shard, S sampled rows, G images, L labels.
"""

import itertools
import math

import torch

from mlcd_ds.partition import ClassPartition

BLOCK = 1024
"""Rows of a block. Part of what a draw means: changing it changes every run's negatives."""

_MASK_31 = (1 << 31) - 1
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def hash_rows(rows: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """A 31-bit hash [n] int64 of (seed, step, row): the finaliser of SplitMix64, in wrapping int64 arithmetic.

    Seed and step are mixed before the row is added: else neighbouring seeds would draw the same rows, shifted.
    """
    key = _mix(_mix(seed * _GOLDEN + 0x632BE59BD9B4E019) + step * _GOLDEN)
    x = rows * _signed(_GOLDEN) + _signed(key)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift_right(x ^ _shift_right(x, 31), 33)


def _mix(x: int) -> int:
    """SplitMix64's finaliser of one number."""
    x &= _MASK_64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as an unsigned number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class ClassSampler:
    """Draws this shard's rows of a step.

    max_rows(G*L): an upper bound of what `draw` returns on ANY shard, known to all ranks without asking.
    """

    def __init__(self, partition: ClassPartition, shard: int, sample_rate: float, seed: int):
        self.partition = partition
        self.start, self.stop = partition.start(shard), partition.stop(shard)
        self.sample_rate = sample_rate
        self.seed = seed
        self.first_block = self.start // BLOCK
        self.num_blocks = -(-self.stop // BLOCK) - self.first_block
        self._rows_per_block = [
            min(BLOCK, partition.num_classes - block * BLOCK)
            for block in range(self.first_block, self.first_block + self.num_blocks)
        ]
        ends = [min((self.first_block + i) * BLOCK, partition.num_classes) for i in range(self.num_blocks + 1)]
        up_to = [math.floor(sample_rate * end + 0.5) for end in ends]
        self._budget_per_block = [stop - start for start, stop in itertools.pairwise(up_to)]

    def max_rows(self, num_labels: int) -> int:
        """Most rows that any shard may draw when the global batch names `num_labels` positives."""
        largest = self.partition.max_size
        if self.sample_rate >= 1:
            return largest
        blocks = largest // BLOCK + 2
        return min(largest, blocks * math.ceil(self.sample_rate * BLOCK) + num_labels)

    def draw(self, labels: torch.Tensor, step: int) -> torch.Tensor:
        """Sorted LOCAL rows [S] int64 of this step.

        labels: int64, any shape, the positives of the global batch as global rows; negative entries are ignored.
        """
        device = labels.device
        if self.sample_rate >= 1:
            return torch.arange(self.stop - self.start, device=device)
        first = self.first_block * BLOCK
        width = self.num_blocks * BLOCK
        offset = labels.flatten() - first
        inside = (offset >= 0) & (offset < width) & (labels.flatten() >= 0)
        # One slot more than the blocks have: what lies outside is written there and dropped, without a host round trip.
        positive = torch.zeros(width + 1, dtype=torch.bool, device=device)
        positive[torch.where(inside, offset, width)] = True
        positive = positive[:width]

        score = hash_rows(torch.arange(first, first + width, device=device), self.seed, step)
        score = score.masked_fill(positive, -1).view(self.num_blocks, BLOCK)
        rows_in_block = torch.tensor(self._rows_per_block, device=device)
        exists = torch.arange(BLOCK, device=device) < rows_in_block[:, None]
        score = score.masked_fill(~exists, _MASK_31 + 1)
        budget = torch.tensor(self._budget_per_block, device=device)
        drawn = score.topk(max(self._budget_per_block), dim=1, largest=False, sorted=True).indices
        within = torch.arange(drawn.shape[1], device=device) < budget[:, None]
        chosen = torch.zeros_like(exists).scatter_(1, drawn, within)
        chosen = chosen.flatten() | positive
        return chosen[self.start - first : self.stop - first].nonzero().squeeze(1)
