"""Which sample stands in which slot of which step: a pure function of the data, the seed and the global batch.

The number of ranks and of loader processes does not enter, so every world size that divides the global batch trains on
the same batches, and a run resumes at any step without replaying the ones before.

Each epoch lays the shards end to end in a random order, a virtual list of N samples, and cuts it into equal lanes. A
lane is permuted in windows of consecutive samples and goes on into the next epoch's lane without end; every step takes
the next few samples of every lane. So each lane-epoch sees each of its samples exactly once, nothing is dropped, a
batch may straddle two epochs, and a rank, which takes consecutive slots, reads few shards at a time.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mlcd_ds.errors import DataError

MAX_LANES = 128
"""Lanes at most: as many shards contribute to one global batch."""

_SHARDS, _WINDOW, _AUGMENT, _POSITIVES = 1, 2, 3, 4  # keep the random streams of different purposes apart


def augmentation_generator(seed: int, epoch: int, shard: int, index: int) -> np.random.Generator:
    """The random choices for one sample in one epoch.

    Philox is a cipher of its counter: (epoch, shard, index) in the counter's upper words gives every sample a stream of
    its own, 2^64 numbers long, without hashing.
    """
    return np.random.Generator(np.random.Philox(key=[seed, _AUGMENT], counter=[0, index, shard, epoch]))


def positives_generator(seed: int, epoch: int, shard: int, index: int) -> np.random.Generator:
    """The random choices among the labels of one sample in one epoch: a stream apart from its augmentation's."""
    return np.random.Generator(np.random.Philox(key=[seed, _POSITIVES], counter=[0, index, shard, epoch]))


class EpochPlan:
    """The order of samples.

    counts: samples of each shard. global_batch: samples of one step over all ranks. shuffle_window: samples within
    which a lane is permuted. Raises DataError when there is nothing to order.
    """

    def __init__(self, seed: int, counts: Sequence[int], global_batch: int, shuffle_window: int):
        self.seed, self.global_batch, self.shuffle_window = seed, global_batch, shuffle_window
        self.counts = np.asarray(counts, np.int64)
        if not len(self.counts) or (self.counts < 1).any() or global_batch < 1 or shuffle_window < 1:
            raise DataError(
                f"no plan for {len(self.counts)} shards of {self.counts.min(initial=0)} and more samples, a global "
                f"batch of {global_batch} and a window of {shuffle_window}: all must be at least 1"
            )
        self.num_samples = int(self.counts.sum())
        limit = min(len(self.counts), MAX_LANES)
        self.lanes = max(lanes for lanes in range(1, limit + 1) if global_batch % lanes == 0)
        self.samples_per_lane = global_batch // self.lanes
        """Samples that a lane gives to every step."""
        self._shard_order = lru_cache(maxsize=4)(self._make_shard_order)
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # of each lane, the one used last

    def samples(self, step: int, start_slot: int, stop_slot: int) -> list[tuple[int, int, int]]:
        """(epoch, shard, index in that shard) of the slots `start_slot`..`stop_slot` of the global batch of `step`."""
        if not 0 <= start_slot <= stop_slot <= self.global_batch or step < 0:
            raise IndexError(f"step {step}, slots {start_slot}..{stop_slot} of a global batch of {self.global_batch}")
        found: list[tuple[int, int, int]] = []
        slot = start_slot
        while slot < stop_slot:
            lane, offset = divmod(slot, self.samples_per_lane)
            take = min(self.samples_per_lane - offset, stop_slot - slot)
            found += self._lane_samples(lane, step * self.samples_per_lane + offset, take)
            slot += take
        return found

    def lanes_of(self, start_slot: int, stop_slot: int) -> int:
        """How many lanes the slots `start_slot`..`stop_slot` belong to."""
        return (stop_slot - 1) // self.samples_per_lane - start_slot // self.samples_per_lane + 1

    def epochs_at(self, step: int) -> float:
        """Epochs that `step` steps amount to."""
        return step * self.global_batch / self.num_samples

    def fingerprint(self) -> str:
        """Changes when the order of samples would: for a checkpoint to compare."""
        digest = hashlib.sha256(f"1 {self.seed} {self.global_batch} {self.shuffle_window} ".encode())
        digest.update(self.counts.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def _lane_bounds(self, lane: int) -> tuple[int, int]:
        return lane * self.num_samples // self.lanes, (lane + 1) * self.num_samples // self.lanes

    def _lane_samples(self, lane: int, position: int, count: int) -> list[tuple[int, int, int]]:
        """`count` samples of the lane's endless stream from `position` on."""
        start, stop = self._lane_bounds(lane)
        found: list[tuple[int, int, int]] = []
        while count:
            epoch, offset = divmod(position, stop - start)
            window, inside = divmod(offset, self.shuffle_window)
            order = self._window_order(lane, epoch, window, stop - start)
            picked = order[inside : inside + count]
            places = start + window * self.shuffle_window + picked.astype(np.int64)
            shards, starts = self._shard_order(epoch)
            slots = np.searchsorted(starts, places, side="right") - 1
            indexes = places - starts[slots]
            found += zip([epoch] * len(picked), shards[slots].tolist(), indexes.tolist(), strict=True)
            position += len(picked)
            count -= len(picked)
        return found

    def _make_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in this epoch's order, where each begins in the virtual list)."""
        order = self._generator(_SHARDS, epoch).permutation(len(self.counts))
        return order, np.concatenate([[0], self.counts[order].cumsum()[:-1]])

    def _window_order(self, lane: int, epoch: int, window: int, lane_size: int) -> np.ndarray:
        cached = self._windows.get(lane)
        if cached is None or cached[0] != (epoch, window):
            size = min(self.shuffle_window, lane_size - window * self.shuffle_window)
            order = self._generator(_WINDOW, epoch, lane, window).permutation(size).astype(np.int32)
            cached = self._windows[lane] = ((epoch, window), order)
        return cached[1]

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *purpose])))

    def __getstate__(self) -> dict:
        return {"args": (self.seed, self.counts, self.global_batch, self.shuffle_window)}

    def __setstate__(self, state: dict) -> None:
        self.__init__(*state["args"])
