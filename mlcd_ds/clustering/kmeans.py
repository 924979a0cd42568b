"""Spherical k-means over memory-mapped features on any number of ranks: Lloyd's iterations, resumable after each one.

Every rank streams its share of the features (float16 on the disk) block by block, finds each one's nearest center, and adds
up the members. The sums are reduce-scattered by center, so each rank normalises k / W centers, which are then all-gathered.

Shapes: n features in use, k centers, d dimensions, b features of a block, W ranks.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mlcd_ds import collectives
from mlcd_ds.clustering.ahead import ahead
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.nearest import exact_index, index_of
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.topology import Topology

BLOCK_ROWS = 65_536
"""Features in memory at a time: 200 MB at 768 dimensions. Part of what a sample means: it is drawn block by block."""

SPLIT = 1 / 1024
"""Relative push, up and down by turns over the dimensions, that tells the halves of a split cluster apart (faiss's)."""

CHECKED = 4096
"""Random features whose nearest centers are looked for exactly, too, where the search is approximate."""

PLUS_PLUS_ROWS = 20
PLUS_PLUS_MOST_CENTERS = 20_000
"""k-means++ looks at this many features per center, and is refused above so many centers: it takes k steps in turn."""


@dataclass(frozen=True)
class Iteration:
    """What one of Lloyd's iterations found.

    number: from 0. objective: mean cosine to the nearest center, before the update. empty: clusters that were split anew.
    moved: share of the features whose nearest center changed; None where the iteration before is not known.
    updated: mean cosine to the same center after the update: what the next objective is at least, but for the centers of
    empty clusters. phase: what a two-level clustering was doing.
    """

    number: int
    objective: float
    empty: int
    moved: float | None
    updated: float | None = None
    phase: str | None = None


@dataclass(frozen=True)
class KMeansState:
    """What an iteration leaves: all that the next one needs. centers_kd: float32, unit rows.

    aside: what a two-level clustering needs beside them, by name.
    """

    centers_kd: np.ndarray
    history: tuple[Iteration, ...]
    aside: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchCheck:
    """What an approximate search misses, of random features. features: how many. found: share of them whose nearest center
    it found. exact, approximate: their mean cosine to the nearest center, and to the one found."""

    features: int
    found: float
    exact: float
    approximate: float


@dataclass(frozen=True)
class KMeansResult:
    """centers_kd: float32, unit rows. history: of all iterations. num_used: n.

    sizes_k: int64, features nearest to each center in the last iteration; None where none was left to be made.
    check: of these centers; None where the search is exact.
    """

    centers_kd: np.ndarray
    history: tuple[Iteration, ...]
    sizes_k: np.ndarray | None
    num_used: int
    check: SearchCheck | None = None


@dataclass(frozen=True)
class Block:
    """Rows of one shard: start..stop, or some of them."""

    number: int
    name: str
    start: int
    stop: int


Part = tuple[Block, np.ndarray | None]
"""A block and those of its rows that are used, sorted; None for all."""


class SphericalKMeans:
    """Lloyd's algorithm for unit vectors under the inner product (Dhillon and Modha, 2001).

    k, iterations, seed as they say. max_points_per_center: at most k times this many features are used, a uniform sample.
    init: "random" (k different features), "kmeans++-subset" (Arthur and Vassilvitskii, 2007, on a sample), or the path of
    an .npy with k rows of d. backend, nprobe: see `nearest`. stop_below: ends early once no more than this share of the
    features moves.
    The same features, seed and number of ranks give the same bytes; another number of ranks the same up to rounding.
    Memory of a rank: 3 k d floats (centers, sums, the index's copy), a few blocks, 8 bytes per feature of its share; with
    several ranks on CPUs gloo's own copies while sums are reduced and centers gathered. `plan.kmeans_memory` counts it.
    """

    def __init__(
        self,
        k: int,
        iterations: int,
        max_points_per_center: int,
        seed: int,
        topology: Topology | None = None,
        init: str = "random",
        backend: str = "faiss",
        nprobe: int = 16,
        stop_below: float = 0.0,
    ):
        self.k, self.iterations, self.seed = k, iterations, seed
        self.total_iterations = iterations
        self.max_points_per_center = max_points_per_center
        self.topology = topology or Topology.single()
        self.init, self.backend, self.nprobe, self.stop_below = init, backend, nprobe, stop_below

    def fit(
        self,
        features: FeatureFolder,
        tell: Callable[[Iteration], None],
        resume: KMeansState | None = None,
        keep: Callable[[KMeansState], None] | None = None,
    ) -> KMeansResult:
        """Clusters `features`; every rank must call it. `tell` and `keep` are called on rank 0 after each iteration.

        resume: the state to go on from, the same on every rank. Raises DataError for fewer features than k, for initial
        centers that do not fit, and, on every rank, for rows that cannot be used (file and row named); ConfigError for
        k-means++ with too many centers.
        """
        _, counts, parts = self.share(features)
        num_used = int(counts.sum())

        def start() -> KMeansState:
            return resume or KMeansState(self.initial(features), ())

        state, sizes_k = self.iterate(features, parts, num_used, start, tell, keep)
        return KMeansResult(state.centers_kd, state.history, sizes_k, num_used, self.check(features, state))

    @property
    def is_exact(self) -> bool:
        """Whether the search finds the nearest center always: in float32, which it is on CPUs alone."""
        return self.backend != "ivf" and self.topology.device.type == "cpu"

    def check(self, features: FeatureFolder, state: KMeansState) -> SearchCheck | None:
        """The search among the state's centers against the exact one; None for an exact search. Every rank must call it."""
        if self.is_exact:
            return None
        blocks, counts, _ = self.share(features)
        number = min(CHECKED, int(counts.sum()))
        rows_nd = self._draw(features, blocks, counts, number, purpose=7)
        own_bd = np.ascontiguousarray(rows_nd[self.topology.rank :: self.topology.world_size])
        cosine_b, found_b = self._searcher(state)(0, own_bd)
        best_b1, nearest_b1 = exact_index(state.centers_kd, self.topology.device).search(own_bd, 1)
        sums = [float((found_b == nearest_b1[:, 0]).sum()), best_b1.sum(dtype=float), cosine_b.sum(dtype=float)]
        return SearchCheck(number, *(self._sum(torch.tensor(sums, dtype=torch.float64)) / number).tolist())

    def iterate(
        self,
        features: FeatureFolder,
        parts: list[Part],
        num_used: int,
        start: Callable[[], KMeansState],
        tell: Callable[[Iteration], None],
        keep: Callable[[KMeansState], None] | None,
    ) -> tuple[KMeansState, np.ndarray | None]:
        """From a state to the end: the last state, and the sizes [k] in the last iteration (None where none was left).

        start: makes the state to begin from. Here, so that no caller keeps its k d floats alive meanwhile.
        """
        state = start()
        nearest_before: list[np.ndarray] | None = None
        sizes_k = None
        while len(state.history) < self.iterations and not self._is_settled(state):
            outcome = self._everywhere(lambda s=state, before=nearest_before: self._assign(features, parts, s, before))
            total, sums_kd, sizes_k, nearest, moved = outcome
            total, moved = self._sum(torch.tensor([total, float(moved)], dtype=torch.float64)).tolist()
            sizes_k = self._sum(torch.from_numpy(sizes_k)).numpy()
            centers_kd, lost_k, updated = self._update(state.centers_kd, sums_kd)
            empty = self._settle(centers_kd, sizes_k, lost_k)
            share = None if nearest_before is None else moved / num_used
            iteration = Iteration(len(state.history), total / num_used, empty, share, updated / num_used)
            state = KMeansState(centers_kd, (*state.history, iteration), state.aside)
            nearest_before = nearest
            if self.topology.is_main:
                tell(iteration)
                if keep is not None:
                    keep(state)
        return state, sizes_k

    def _is_settled(self, state: KMeansState) -> bool:
        last = state.history[-1] if state.history else None
        return last is not None and last.moved is not None and last.moved <= self.stop_below and last.empty == 0

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over the ranks; through the device, for NCCL knows no other memory."""
        return collectives.sum_(tensor.to(self.topology.device), self.topology).cpu()

    def _everywhere(self, function: Callable[[], tuple]) -> tuple:
        """`function()` of this rank; what one rank raises for its rows, all raise."""
        result, error = None, None
        try:
            result = function()
        except DataError as raised:
            error = raised
        failed = torch.tensor([int(error is not None)], device=self.topology.device)
        if int(collectives.max_(failed, self.topology)):
            raise next(found for found in collectives.gather_objects(error, self.topology) if found is not None)
        return result

    # ------------------------------------------------------------------------------------------------ which features

    def share(self, features: FeatureFolder) -> tuple[list[Block], np.ndarray, list[Part]]:
        """All blocks, how many features of each are used, and this rank's part: its blocks with their rows, sorted, or None
        for all of them. Raises DataError for fewer features than k."""
        n = features.num_features
        if self.k > n:
            raise DataError(
                f"--k {self.k} is more than the {n} features in {features.path}: use at most {n} centers, and for clusters "
                f"that mean something about {max(1, n // 39)} (39 features each)"
            )
        blocks = _blocks(features)
        counts = self._sample_counts([block.stop - block.start for block in blocks])
        own = range(self.topology.rank, len(blocks), self.topology.world_size)
        return blocks, counts, [(blocks[i], self._rows(blocks[i], counts[i])) for i in own]

    def _sample_counts(self, rows: Sequence[int]) -> np.ndarray:
        """How many features of each block are used: all, or shares of a uniform sample without replacement."""
        wanted = self.k * self.max_points_per_center
        if sum(rows) <= wanted:
            return np.asarray(rows)
        generator = np.random.default_rng([self.seed, 1])
        return generator.multivariate_hypergeometric(rows, wanted, method="marginals")

    def _rows(self, block: Block, count: int) -> np.ndarray | None:
        """The rows of a block that are used, sorted; None for all. A function of (seed, block)."""
        length = block.stop - block.start
        if count == length:
            return None
        generator = np.random.default_rng([self.seed, 2, block.number])
        return block.start + np.sort(generator.choice(length, count, replace=False, shuffle=False))

    def _draw(self, features: FeatureFolder, blocks, counts: np.ndarray, number: int, purpose: int) -> np.ndarray:
        """`number` different used features, float32 [number, d] on every rank, in the order of the blocks."""
        shares = np.random.default_rng([self.seed, purpose]).multivariate_hypergeometric(
            counts, number, method="marginals"
        )
        drawn = torch.zeros(number, features.dim)
        starts = np.concatenate([[0], np.cumsum(shares)])

        def fill() -> tuple:
            for i in range(self.topology.rank, len(blocks), self.topology.world_size):
                if shares[i]:
                    block, used = blocks[i], self._rows(blocks[i], counts[i])
                    used = np.arange(block.start, block.stop) if used is None else used
                    generator = np.random.default_rng([self.seed, purpose, block.number])
                    rows = used[np.sort(generator.choice(len(used), shares[i], replace=False, shuffle=False))]
                    values = features.unit_rows(block.name, 0, len(rows), rows)
                    drawn[starts[i] : starts[i + 1]] = torch.from_numpy(values)
            return ()

        self._everywhere(fill)
        return self._sum(drawn).numpy()

    def initial(self, features: FeatureFolder) -> np.ndarray:
        """The centers to start from, float32 unit rows [k, d], on every rank."""
        blocks, counts, _ = self.share(features)
        return self._initial(features, blocks, counts)

    def _initial(self, features: FeatureFolder, blocks, counts: np.ndarray) -> np.ndarray:
        if self.init == "random":
            return self._draw(features, blocks, counts, self.k, purpose=3)
        if self.init == "kmeans++-subset":
            if self.k > PLUS_PLUS_MOST_CENTERS:
                raise ConfigError(
                    f"--init kmeans++-subset takes {self.k} steps in turn, each through {PLUS_PLUS_ROWS * self.k} features: "
                    f"it is meant for up to {PLUS_PLUS_MOST_CENTERS} centers. Use --init random: at large k it loses little."
                )
            from sklearn.cluster import kmeans_plusplus

            subset = self._draw(features, blocks, counts, min(PLUS_PLUS_ROWS * self.k, int(counts.sum())), purpose=4)
            return kmeans_plusplus(subset, self.k, random_state=self.seed)[0].astype(np.float32)
        return _initial_from(Path(self.init), self.k, features.dim)

    # ------------------------------------------------------------------------------------------------ an iteration

    def _searcher(self, state: KMeansState) -> Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """What finds (cosine [b], nearest [b]) for this rank's block of that number, float32 unit rows [b, d]."""
        index = index_of(state.centers_kd, self.backend, self.topology.device, self.nprobe)

        def search(_: int, block_bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            cosine_b1, nearest_b1 = index.search(block_bd, 1)
            return cosine_b1[:, 0], nearest_b1[:, 0]

        return search

    def _settle(self, centers_kd: np.ndarray, sizes_k: np.ndarray, lost_k: np.ndarray) -> int:
        """Mends the new centers in place, the same on every rank; returns how many clusters were empty."""
        return split_largest(centers_kd, sizes_k, lost_k)

    def _assign(self, features: FeatureFolder, parts, state: KMeansState, before: list[np.ndarray] | None) -> tuple:
        """(sum of cosines, sums [k' , d] with k' a multiple of W, sizes [k], nearest of each block, moved) of this rank."""
        search = self._searcher(state)
        padded = -(-self.k // self.topology.world_size) * self.topology.world_size
        sums_kd = torch.zeros(padded, features.dim, device=self.topology.device)
        sizes_k = np.zeros(self.k, np.int64)
        total, moved, nearest = 0.0, 0, []
        for number, block_bd in enumerate(read_all(features, parts, self.topology.device)):
            cosine_b, nearest_b = search(number, block_bd)
            total += float(cosine_b.sum(dtype=np.float64))
            sums_kd.index_add_(
                0, torch.from_numpy(nearest_b).to(sums_kd.device), torch.from_numpy(block_bd).to(sums_kd.device)
            )
            sizes_k += np.bincount(nearest_b, minlength=self.k)
            nearest.append(nearest_b.astype(np.int32))
            if before is not None:
                moved += int((nearest[-1] != before[number]).sum())
        return total, sums_kd, sizes_k, nearest, moved

    def _update(self, centers_kd: np.ndarray, sums_kd: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float]:
        """New centers [k, d] on every rank, each normalised by one; whether its members cancelled out [k]; and the sum of
        all members' cosines to their new center, which is that of the sums' lengths."""
        W, k = self.topology.world_size, self.k
        first = self.topology.rank * (len(sums_kd) // W)
        own_kd = collectives.reduce_scatter(sums_kd, self.topology)
        if W > 1:
            sums_kd.untyped_storage().resize_(0)  # k d floats that the caller's frames would keep alive
        lengths_k1 = own_kd.norm(dim=1, keepdim=True)
        # Members that cancel out leave no direction: such a center is as good as empty. Where no other cluster is left to
        # be split, it stays where it is.
        lost_k1 = lengths_k1 < 1e-6
        own_kd /= lengths_k1.masked_fill(lost_k1, 1)
        lost = lost_k1[: max(0, k - first), 0].nonzero()[:, 0]
        own_kd[lost] = torch.from_numpy(centers_kd[first + lost.cpu().numpy()]).to(own_kd.device)
        whole_kd = collectives.all_gather(own_kd, self.topology)[:k]
        lost_k = collectives.all_gather(lost_k1[:, 0].to(torch.int32), self.topology)[:k]
        updated = self._sum(lengths_k1.sum(dtype=torch.float64))
        return whole_kd.cpu().numpy(), lost_k.cpu().numpy().astype(bool), float(updated)


def read(features: FeatureFolder, part: Part, out: np.ndarray | None = None) -> np.ndarray:
    """The used rows of a block, float32 [b, d] of length 1; in `out` where that is given."""
    block, rows = part
    start, stop = (block.start, block.stop) if rows is None else (0, len(rows))
    return features.unit_rows(block.name, start, stop, rows, out)


def read_all(features: FeatureFolder, parts: list[Part], device: torch.device) -> Iterator[np.ndarray]:
    """What `read` gives for each, the next one read ahead where a GPU searches.

    A block is overwritten once the next one has been asked for.
    """
    most = max((part[0].stop - part[0].start if part[1] is None else len(part[1]) for part in parts), default=0)
    two = np.empty((min(2, len(parts)), most, features.dim), np.float32)
    return ahead(read, zip(itertools.repeat(features), parts, itertools.cycle(two)), device)


def _blocks(features: FeatureFolder) -> list[Block]:
    blocks: list[Block] = []
    for name, count in zip(features.names, features.rows, strict=True):
        for start in range(0, count, BLOCK_ROWS):
            blocks.append(Block(len(blocks), name, start, min(start + BLOCK_ROWS, count)))
    return blocks


def _initial_from(path: Path, k: int, d: int) -> np.ndarray:
    """Initial centers from an .npy. Raises DataError where they do not fit."""
    try:
        centers_kd = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--init {path} cannot be read ({error}): expected random, kmeans++-subset, or an .npy of [{k}, {d}] floats"
        ) from None
    if centers_kd.shape != (k, d) or centers_kd.dtype.kind != "f":
        raise DataError(f"--init {path} holds {centers_kd.dtype} {list(centers_kd.shape)}, expected floats [{k}, {d}]")
    lengths_k1 = np.linalg.norm(centers_kd.astype(np.float32), axis=1, keepdims=True)
    bad = ~np.isfinite(lengths_k1[:, 0]) | (lengths_k1[:, 0] == 0)
    if bad.any():
        raise DataError(f"--init {path}: row {int(bad.argmax())} has no direction ({int(bad.sum())} such rows)")
    return (centers_kd / lengths_k1).astype(np.float32)


def split_largest(centers_kd: np.ndarray, sizes_k: np.ndarray, lost_k: np.ndarray) -> int:
    """Gives each empty (or `lost`) cluster half of the largest one, in place; returns how many (0 if all are lost).

    Sizes are halved in the books only: the next assignment counts anew.
    """
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
