"""Spherical k-means over memory-mapped features: Lloyd's iterations, assignment by faiss, empty clusters split again.

Shapes: n features in use, k centers, d dimensions, b features of a block.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.errors import DataError

BLOCK_ROWS = 65_536
"""Features in memory at a time: 200 MB at 768 dimensions."""

SPLIT = 1 / 1024
"""Relative push, up and down by turns over the dimensions, that tells the halves of a split cluster apart (faiss's)."""


@dataclass(frozen=True)
class KMeansResult:
    """centers_kd: float32, unit rows. objective: mean cosine to the nearest center, before each iteration's update.

    sizes_k: int64, features nearest to each center in the last iteration. reseeded: empty clusters that were split anew,
    per iteration. num_used: n.
    """

    centers_kd: np.ndarray
    objective: list[float]
    sizes_k: np.ndarray
    reseeded: list[int]
    num_used: int


class SphericalKMeans:
    """Lloyd's algorithm for unit vectors under the inner product (Dhillon and Modha, 2001).

    k, iterations, seed as they say. max_points_per_center: at most k times this many features are used, a uniform sample.
    The same features and seed give the same bytes. Memory: the centers and their sums (8 k d bytes), and a block.
    """

    def __init__(self, k: int, iterations: int, max_points_per_center: int, seed: int):
        self.k, self.iterations, self.seed = k, iterations, seed
        self.max_points_per_center = max_points_per_center

    def fit(self, features: FeatureFolder, tell: Callable[[int, float, int], None]) -> KMeansResult:
        """Clusters `features`; `tell(iteration, objective, empty clusters)` after each iteration.

        Raises DataError for fewer features than k, and for rows that cannot be used (file and row named).
        """
        n = features.num_features
        if self.k > n:
            raise DataError(
                f"--k {self.k} is more than the {n} features in {features.path}: use at most {n} centers, and for clusters "
                f"that mean something about {max(1, n // 39)} (39 features each)"
            )
        generator = np.random.default_rng(self.seed)
        selected = self._sample(features, generator)
        num_used = n if selected is None else sum(len(rows) for rows in selected.values())
        centers_kd = self._initial(features, selected, generator)
        objective: list[float] = []
        reseeded: list[int] = []
        for iteration in range(self.iterations):
            total, sums_kd, sizes_k = self._assign(features, selected, centers_kd)
            objective.append(total / num_used)
            sums_kd = sums_kd.numpy()
            lengths_k1 = np.linalg.norm(sums_kd, axis=1, keepdims=True)
            # Members that cancel out leave no direction: such a center is as good as empty. Where no other cluster is
            # left to be split, it stays where it is.
            lost_k = lengths_k1[:, 0] < 1e-6
            centers_kd = np.where(lost_k[:, None], centers_kd, sums_kd / np.where(lost_k[:, None], 1, lengths_k1))
            reseeded.append(split_largest(centers_kd, sizes_k, lost_k))
            tell(iteration, objective[-1], reseeded[-1])
        return KMeansResult(centers_kd, objective, sizes_k, reseeded, num_used)

    def _sample(self, features: FeatureFolder, generator) -> dict[str, np.ndarray] | None:
        """Sorted rows per shard, uniform without replacement; None for all of them."""
        wanted, n = self.k * self.max_points_per_center, features.num_features
        if n <= wanted:
            return None
        chosen = np.sort(generator.choice(n, wanted, replace=False, shuffle=False))
        starts = np.concatenate([[0], np.cumsum(features.rows)])
        parts = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
        return {name: part - start for name, part, start in zip(features.names, parts, starts[:-1], strict=True)}

    def _initial(self, features: FeatureFolder, selected, generator) -> np.ndarray:
        """k different random rows."""
        counts = [
            len(selected[name]) if selected else rows for name, rows in zip(features.names, features.rows, strict=True)
        ]
        chosen = np.sort(generator.choice(sum(counts), self.k, replace=False, shuffle=False))
        starts = np.concatenate([[0], np.cumsum(counts)])
        parts = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
        centers = []
        for name, start, part in zip(features.names, starts[:-1], parts, strict=True):
            rows = selected[name][part - start] if selected else part - start
            if len(rows):
                centers.append(features.unit_rows(name, 0, len(rows), rows))
        return np.concatenate(centers)

    def _assign(self, features: FeatureFolder, selected, centers_kd: np.ndarray):
        """(sum of cosines, sums of the members [k, d], members [k]) of the assignment to `centers_kd`."""
        index = index_of(centers_kd)
        sums_kd = torch.zeros(centers_kd.shape)
        sizes_k = np.zeros(self.k, np.int64)
        total = 0.0
        for block_bd in _blocks(features, selected):
            cosine_b1, nearest_b1 = index.search(block_bd, 1)
            nearest_b = nearest_b1[:, 0]
            total += float(cosine_b1.sum(dtype=np.float64))
            sums_kd.index_add_(0, torch.from_numpy(nearest_b), torch.from_numpy(block_bd))
            sizes_k += np.bincount(nearest_b, minlength=self.k)
        return total, sums_kd, sizes_k


def index_of(centers_kd: np.ndarray):
    """faiss's exact index of centers [k, d] float32 under the inner product."""
    import faiss  # a second of import time that only clustering needs

    index = faiss.IndexFlatIP(centers_kd.shape[1])
    index.add(np.ascontiguousarray(centers_kd))
    return index


def _blocks(features: FeatureFolder, selected: dict[str, np.ndarray] | None) -> Iterator[np.ndarray]:
    for name, count in zip(features.names, features.rows, strict=True):
        rows = None if selected is None else selected[name]
        length = count if rows is None else len(rows)
        for start in range(0, length, BLOCK_ROWS):
            yield features.unit_rows(name, start, min(start + BLOCK_ROWS, length), rows)


def split_largest(centers_kd: np.ndarray, sizes_k: np.ndarray, lost_k: np.ndarray) -> int:
    """Gives each empty (or `lost`) cluster half of the largest one, in place; returns how many (0 if all are lost).

    Sizes are halved in the books only: the next assignment counts anew.
    """
    import heapq

    empty = np.flatnonzero((sizes_k == 0) | lost_k)
    if len(empty) in (0, len(sizes_k)):
        return 0
    taken = set(empty.tolist())
    heap = [(-int(size), center) for center, size in enumerate(sizes_k) if center not in taken]
    heapq.heapify(heap)
    push = np.where(np.arange(centers_kd.shape[1]) % 2 == 0, 1 + SPLIT, 1 - SPLIT).astype(np.float32)
    for center in empty:
        size, largest = heap[0]
        centers_kd[center] = centers_kd[largest] * push
        centers_kd[largest] *= 2 - push
        for row in (center, largest):
            centers_kd[row] /= np.linalg.norm(centers_kd[row])
        half = math.ceil(-size / 2)
        heapq.heapreplace(heap, (-half, largest))
        heapq.heappush(heap, (-(-size - half), int(center)))
    return len(empty)
