"""Which classes take part in a micro-step: every positive of the global batch, and random others (partial FC's sampling).

Each class that is nobody's positive is drawn with the same probability, by comparing a hash of (seed, step, global row)
with a threshold. Nothing else enters: neither the number of ranks nor the borders of the shards change who is drawn, no
two shards need to talk, and there is no sorting. The number of negatives is thus binomial, round its mean; its spread is
sqrt(r (1-r) K), 300 of 100,000.

How many, by `sample_budget` (P distinct positives of K classes, sample rate r):

    negatives   r (K - P) negatives beside the P positives: the paper's text, |N'| = r |N| (section 3), whatever the batch.
    total       r K classes with the positives among them, as the published partial FC code does. Where P > r K no negative
                but other images' positives is left: at the paper's batch of 32,800 with 8 labels, P is about 231,000 of a
                million, and r = 0.1 quietly means no random negatives at all.

c classes of this shard, S sampled rows, G images, L labels.
"""

import math
from dataclasses import dataclass

import torch

from mlcd_ds.partition import ClassPartition

_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_HASH_BITS = 31


def hash_rows(first: int, stop: int, seed: int, step: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """31-bit hashes of (seed, step, row) for rows first..stop, int32 [stop - first], see `hash_`."""
    return hash_(torch.arange(first, stop, dtype=torch.int32, device=device), seed, step).bitwise_and_(0x7FFFFFFF)


def hash_(x: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Turns int32 numbers in place into hashes of (seed, step, number), all 32 bits; different numbers stay different.

    Two multiply-and-shift rounds in wrapping int32 arithmetic (vectorised everywhere, a quarter of int64's cost), with half
    of a 64-bit key of (seed, step) before each: neighbouring seeds or steps share nothing, not even shifted.
    """
    key = _mix(_mix(seed * _GOLDEN + 0x632BE59BD9B4E019) + step * _GOLDEN)
    shifted = torch.empty_like(x)

    def fold(bits: int) -> None:
        """x ^= x >> bits, a logical shift: torch's copies the sign."""
        torch.bitwise_right_shift(x, bits, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - bits)) - 1))

    x += _signed_32(key)
    fold(16)
    x *= _signed_32(0x7FEB352D)
    x ^= _signed_32(key >> 32)
    fold(15)
    x *= _signed_32(0x846CA68B)
    fold(16)
    return x


def _mix(x: int) -> int:
    """SplitMix64's finaliser of one number."""
    x &= _MASK_64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)


def _signed_32(value: int) -> int:
    """The int32 with the same bits as the lowest 32 of an unsigned number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


@dataclass(frozen=True)
class Marked:
    """The classes of a micro-step before the host knows how many there are, see PartialFC.mark.

    labels_GL: int64, what is positive for each image of the global batch. counts_G: bool, false in rows that are no image.
    here_GL: bool, whether this shard has the label. marked_c: bool, which local rows take part; None: all. sizes_2: int64,
    how many rows that is, and how many pairs of an image and a label are here. capacity: images a rank, padding included.
    """

    labels_GL: torch.Tensor
    counts_G: torch.Tensor
    here_GL: torch.Tensor
    marked_c: torch.Tensor | None
    sizes_2: torch.Tensor
    capacity: int


@dataclass(frozen=True)
class Draw:
    """Which images and classes meet in a micro-step, see PartialFC.draw.

    labels_GL, counts_G, capacity: as in Marked. rows_S: int64, the sampled rows of this shard, sorted. columns_GL: where
    each label stands among them, S where it does not (no label, or another shard's). pairs_P: int64, the positions of the
    others in columns_GL, taken as flat.
    """

    labels_GL: torch.Tensor
    counts_G: torch.Tensor
    rows_S: torch.Tensor
    columns_GL: torch.Tensor
    pairs_P: torch.Tensor
    capacity: int


class ClassSampler:
    """Draws this shard's rows of a micro-step.

    budget: "negatives" or "total", see the head of this file.
    """

    def __init__(self, partition: ClassPartition, shard: int, sample_rate: float, seed: int, budget: str = "negatives"):
        self.partition = partition
        self.start, self.stop = partition.start(shard), partition.stop(shard)
        self.sample_rate = sample_rate
        self.seed = seed
        self.budget = budget

    def likely_rows(self, num_labels: int) -> int:
        """What a shard hardly exceeds when the global batch names `num_labels` positives; all ranks know it without asking.

        Six deviations above the mean of the negatives, and twice the distinct positives of `num_labels` uniform labels: true
        labels fall unevenly on the shards. It sizes the chunks; where it is exceeded, they take more memory.
        """
        largest, r = self.partition.max_size, self.sample_rate
        if r >= 1:
            return largest
        negatives = r * largest + 6 * math.sqrt(r * (1 - r) * largest) + 1
        positives = largest * -math.expm1(-num_labels / self.partition.num_classes)
        return min(largest, math.ceil(negatives + 2 * positives + 6 * math.sqrt(positives)))

    @property
    def takes_all(self) -> bool:
        """Whether every row takes part in every step."""
        return self.sample_rate >= 1

    def mark(self, labels: torch.Tensor, step: int) -> torch.Tensor:
        """bool [c]: which local rows take part in this micro-step. On a GPU the host waits for nothing.

        labels: int64, any shape, the positives of the global batch as global rows; entries outside 0..K-1 are ignored.
        """
        device = labels.device
        if self.takes_all:
            return torch.ones(self.stop - self.start, dtype=torch.bool, device=device)
        if self.budget == "total":
            positive_K = _marked(labels, 0, self.partition.num_classes)
            positive = positive_K[self.start : self.stop]
            others = self.partition.num_classes - positive_K.sum().double()
            share = 1 - (1 - self.sample_rate) * self.partition.num_classes / others.clamp_min(1)
            threshold = (share.clamp(0, 1) * ((1 << _HASH_BITS) - 1)).to(torch.int32)
        else:
            positive = _marked(labels, self.start, self.stop)
            threshold = int(self.sample_rate * (1 << _HASH_BITS))
        # In pieces that stay in a CPU's cache; on a GPU in one, for each piece is a dozen kernels there.
        piece = 1 << 16 if device.type == "cpu" else self.stop - self.start
        for first in range(self.start, self.stop, piece):
            stop = min(first + piece, self.stop)
            drawn = hash_rows(first, stop, self.seed, step, device) < threshold
            positive[first - self.start : stop - self.start].logical_or_(drawn)
        return positive

    def draw(self, labels: torch.Tensor, step: int) -> torch.Tensor:
        """The marked rows, sorted, int64 [S]. Here the host waits for their number."""
        marked = self.mark(labels, step)
        return positions(marked, int(marked.sum()))


def positions(marked: torch.Tensor, number: int) -> torch.Tensor:
    """Where a bool vector is true, sorted, int64 [number]. number: of true entries, exactly.

    Given it, the host waits for nothing on a GPU, where `nonzero` would count first and stop the host for the count.
    """
    if marked.is_cuda:
        return torch.nonzero_static(marked, size=number).squeeze(1)
    return marked.nonzero().squeeze(1)  # counts again, and is faster all the same


def _marked(labels: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """bool [stop - first]: whether a row is among the labels."""
    offset = labels.flatten() - first
    # One slot more than there are rows: what lies outside is written there and dropped, without a host round trip.
    offset = torch.where((offset >= 0) & (offset < stop - first), offset, stop - first)
    marked = torch.zeros(stop - first + 1, dtype=torch.bool, device=labels.device)
    return marked.index_fill_(0, offset, True)[:-1]
