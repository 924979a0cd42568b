"""Two-level spherical k-means: coarse clusters of even size, k-means inside each, then iterations over all centers.

An iteration over all centers takes n k d products; one inside K coarse clusters of n / K features and k / K centers each
takes n k d / K. So does one of the first level, which sees 1024 K features alone. The iterations over all centers at the end
look into those of a feature's 16 nearest coarse clusters: 16 n k d / K.

Every phase is an iteration of `kmeans` with another search: every rank streams its share of the features, block by block; a
feature's candidates are the centers of its coarse cluster (a block's rows are read in the order of these); the sums are
reduce-scattered by center. No feature travels to another rank, no rank depends on the size of a coarse cluster, and any
number of ranks finds the same up to rounding.

Traffic of an iteration inside the coarse clusters, on every rank: one reduce-scatter and one all-gather of k d floats (at 1M
centers of 768: 3 GB each), as in a global one, and its share of the features from the disk. Once, between the levels: an
all-reduce of k d floats, and two of K numbers per block of features (1000 coarse clusters, 41,000 tars: 330 MB each).
Memory of a rank: 3 k d floats (centers, sums, a copy on GPUs or while gathering) and 2 k d / W while the sums are reduced,
two blocks of features, 22 bytes for each probe of a block's features, 4 K numbers per block of features between the levels,
and 20 bytes per feature of its share.

Shapes: n features in use, k centers, d dimensions, K coarse clusters, N blocks of features, b features of a block, W ranks.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.kmeans import (
    Iteration,
    KMeansResult,
    KMeansState,
    Part,
    SphericalKMeans,
    read,
    read_all,
    split_largest,
)
from mlcd_ds.clustering.nearest import GroupedSearch, index_of
from mlcd_ds.errors import ConfigError

COARSE_POINTS = 1024
"""Features per coarse cluster that the first level looks at: their shares of the rest are known to about 3%."""

CAP = 1.5
"""A coarse cluster of more than so many times its share is split. (The work of the second level is the mean square of these
shares times that of even ones.)"""

PROBES = 4
"""Coarse clusters, the nearest ones, whose centers are a feature's candidates at the end of the second level."""

COARSE_ITERATIONS = 10
"""Of the first level, where there are so many: fewer leave its clusters uneven."""

FINE_SHARE = 0.4
"""Of the iterations are made in the second level; half of these look into one coarse cluster, the others into PROBES."""

COARSE, FINE, GLOBAL = "coarse", "fine", "global"
"""Phases, in their order."""


class TwoLevelKMeans:
    """What `flat` would do, in a fraction of its time.

    flat.iterations: how many each level has follows from it (`levels_iterations`). flat.init: how the coarse clusters
    begin. coarse: K; None for the root of k. refinements: iterations over all centers at the end. probes: coarse
    clusters, a feature's nearest ones, whose centers these look into; 0, or K and more: they look at all centers, by
    flat.backend. Raises ConfigError for more coarse clusters than centers.
    """

    def __init__(self, flat: SphericalKMeans, coarse: int | None = None, refinements: int = 2, probes: int = 16):
        root = max(1, round(math.sqrt(flat.k)))
        self.coarse = root if coarse is None else coarse
        if self.coarse > flat.k:
            raise ConfigError(f"--coarse {self.coarse} is more than --k {flat.k}: use about {root}, its root")
        few = "torch" if flat.backend == "torch" else "faiss"  # so few centers need no inverted file
        common = {"topology": flat.topology, "nprobe": flat.nprobe}
        coarsely, fine, narrow = levels_iterations(flat.iterations)
        self.first = _Balanced(self.coarse, coarsely, COARSE_POINTS, flat.seed, init=flat.init, backend=few, **common)
        own = {"max_points_per_center": flat.max_points_per_center, "seed": flat.seed, "stop_below": flat.stop_below}
        self.second = _Grouped(flat.k, fine, **own, **common)
        self.second.narrow = narrow
        if 0 < probes < self.coarse:
            self.third = _Probed(flat.k, refinements, **own, **common, backend=few)
            self.third.probes = probes
        else:
            self.third = SphericalKMeans(flat.k, refinements, **own, **common, backend=flat.backend)
        self.total_iterations = sum(phase.iterations for phase in (self.first, self.second, self.third))

    def fit(
        self,
        features: FeatureFolder,
        tell: Callable[[Iteration], None],
        resume: KMeansState | None = None,
        keep: Callable[[KMeansState], None] | None = None,
    ) -> KMeansResult:
        """See `SphericalKMeans.fit`. The history goes through all phases, whose names its iterations carry.

        The objective of the first phases is the mean cosine to the center of a feature's own coarse cluster, and to the
        nearest one inside it; only that of the last phase is to the nearest of all, or of all that it looks into.
        """
        _, counts, parts = self.second.share(features)
        num_used = int(counts.sum())
        state, sizes_k = resume or KMeansState(np.zeros((0, features.dim), np.float32), ()), None
        reached = state.history[-1].phase if state.history else COARSE
        if reached == COARSE:
            _, counts, sample = self.first.share(features)
            if not state.history:
                state = KMeansState(self.first.initial(features), ())
            state, _ = _phase(COARSE, self.first, features, sample, int(counts.sum()), state, tell, keep)
            state = self.second.begin(features, self.first, state)
        elif reached == FINE:
            self.second.go_on(features, self.first, state)
        if reached != GLOBAL:
            inside = self.second.parts
            state, sizes_k = _phase(FINE, self.second, features, inside, num_used, state, tell, keep)
            self.second.forget()
        if isinstance(self.third, _Probed):
            self.third.first_K = state.aside["first"]
        else:
            state = replace(state, aside={})
        if self.refinements:
            state, sizes_k = _phase(GLOBAL, self.third, features, parts, num_used, state, tell, keep)
        return KMeansResult(state.centers_kd, state.history, sizes_k, num_used, self.third.check(features, state))

    @property
    def refinements(self) -> int:
        """Iterations over all centers."""
        return self.third.iterations


def levels_iterations(iterations: int) -> tuple[int, int, int]:
    """(iterations of the first level, of the second, those of it with one coarse cluster a feature) in place of
    `iterations` of a flat clustering: more of each gain little."""
    coarsely = min(iterations, max(COARSE_ITERATIONS, math.ceil(iterations / 2)))
    fine = math.ceil(FINE_SHARE * iterations)
    return coarsely, fine, fine - math.ceil(fine / 2)


def _phase(
    name: str,
    kmeans: SphericalKMeans,
    features: FeatureFolder,
    parts: list[Part],
    num_used: int,
    state: KMeansState,
    tell: Callable[[Iteration], None],
    keep: Callable[[KMeansState], None] | None,
) -> tuple[KMeansState, np.ndarray | None]:
    """The iterations of one phase, from the whole history to the whole history."""
    before = tuple(iteration for iteration in state.history if iteration.phase != name)

    def named(iteration: Iteration) -> Iteration:
        return replace(iteration, number=len(before) + iteration.number, phase=name)

    def whole(found: KMeansState) -> KMeansState:
        own = (named(replace(iteration, number=number)) for number, iteration in enumerate(found.history))
        return replace(found, history=(*before, *own))

    own, sizes_k = kmeans.iterate(
        features,
        parts,
        num_used,
        lambda: replace(state, history=state.history[len(before) :]),
        lambda iteration: tell(named(iteration)),
        keep and (lambda found: keep(whole(found))),
    )
    return whole(own), sizes_k


class _Balanced(SphericalKMeans):
    """The first level: after each iteration the smallest clusters are given up for halves of those beyond CAP shares."""

    def _is_settled(self, state: KMeansState) -> bool:
        return False

    def _settle(self, centers_kd: np.ndarray, sizes_k: np.ndarray, lost_k: np.ndarray) -> int:
        lost_k = lost_k | given_up(sizes_k)
        return split_largest(centers_kd, sizes_k, lost_k)


def given_up(sizes_k: np.ndarray) -> np.ndarray:
    """Which clusters to give up: bool [k]. The smallest, as long as the largest, halved for each, is beyond CAP shares and
    its half larger than what is given up."""
    share = sizes_k.sum() / len(sizes_k)
    largest = [-int(size) for size in sizes_k]
    heapq.heapify(largest)
    given_k = np.zeros(len(sizes_k), bool)
    for center in np.argsort(sizes_k, kind="stable"):
        size = -largest[0]
        if size <= CAP * share or size <= 2 * sizes_k[center]:
            break
        given_k[center] = True
        heapq.heapreplace(largest, -math.ceil(size / 2))
        heapq.heappush(largest, -(size // 2))
    return given_k


class _InGroups(SphericalKMeans):
    """Centers that lie side by side with those of their coarse cluster, and are searched for by it."""

    first_K: np.ndarray
    """Coarse cluster g has the centers first_K[g] .. first_K[g + 1]: int64 [K + 1]."""

    def _settle(self, centers_kd: np.ndarray, sizes_k: np.ndarray, lost_k: np.ndarray) -> int:
        empty = 0
        idle = np.flatnonzero((sizes_k == 0) | lost_k)
        for group in np.unique(np.searchsorted(self.first_K, idle, side="right") - 1):
            own = slice(self.first_K[group], self.first_K[group + 1])
            empty += split_largest(centers_kd[own], sizes_k[own], lost_k[own])
        return empty


class _Probed(_InGroups):
    """The last level: a feature's candidates are the centers of its `probes` nearest coarse clusters.

    At probes / K of the products of a search among all: with one such iteration over all centers, a clustering of 20
    iterations could never take less than a twentieth of flat's time.
    """

    probes: int
    is_exact = False

    def _searcher(self, state: KMeansState):
        coarse = index_of(state.aside["coarse"], self.backend, self.topology.device)
        index = GroupedSearch(state.centers_kd, state.aside["first"], self.topology.device)
        return lambda _, block_bd: index.search_several(block_bd, coarse.search(block_bd, self.probes)[1])


class _Grouped(_InGroups):
    """The second level: a feature's candidates are the centers of its coarse cluster, which lie side by side.

    In the last iterations they are those of its PROBES nearest coarse clusters: at PROBES / K of the price of a global
    iteration, features near a border move to the other side.
    """

    narrow: int
    """Iterations with one coarse cluster a feature."""
    parts: list[Part]
    """This rank's part, the rows of each block in the order of their coarse clusters (int32)."""
    counts: list[np.ndarray]
    """How many of each coarse cluster: int32 [K] for each of `parts`."""
    probes: list[np.ndarray]
    """The PROBES nearest coarse clusters of every feature, [b, PROBES] for each of `parts`."""

    def begin(self, features: FeatureFolder, coarse: _Balanced, state: KMeansState) -> KMeansState:
        """Centers for each coarse cluster in proportion to its features, from different ones of them drawn uniformly.

        A function of the coarse clusters, the seed and the blocks of features: not of the number of ranks.
        """
        blocks, _, parts = self.share(features)
        self._find_groups(features, parts, coarse, state.centers_kd)
        counts_NK = torch.zeros(len(blocks), coarse.k, dtype=torch.int32)
        for (block, _), counts_K in zip(self.parts, self.counts, strict=True):
            counts_NK[block.number] = torch.from_numpy(counts_K)
        counts_NK = self._sum(counts_NK).numpy()
        sizes_K = counts_NK.sum(0, dtype=np.int64)
        self.first_K = np.concatenate([[0], np.cumsum(centers_per_group(sizes_K, self.k))])
        centers_kd = self._draw_inside(features, counts_NK)
        aside = {"coarse": state.centers_kd, "first": self.first_K, "sizes": sizes_K}
        return KMeansState(centers_kd, state.history, aside)

    def go_on(self, features: FeatureFolder, coarse: _Balanced, state: KMeansState) -> None:
        """Finds the coarse cluster of each feature again, for a state that has passed `begin`."""
        _, _, parts = self.share(features)
        self._find_groups(features, parts, coarse, state.aside["coarse"])
        self.first_K = state.aside["first"]

    def forget(self) -> None:
        """Frees what only this level needs."""
        self.parts, self.counts, self.probes = [], [], []

    def _find_groups(
        self, features: FeatureFolder, parts: list[Part], coarse: _Balanced, centers_Kd: np.ndarray
    ) -> None:
        index = index_of(centers_Kd, coarse.backend, self.topology.device)
        kind, wanted = np.int16 if coarse.k <= 2**15 else np.int32, min(PROBES, coarse.k)
        self.forget()

        def find() -> tuple:
            for (block, rows), block_bd in zip(parts, read_all(features, parts, self.topology.device), strict=True):
                probes_bp = index.search(block_bd, wanted)[1].astype(kind)
                rows = np.arange(block.start, block.stop) if rows is None else rows
                order_b = np.argsort(probes_bp[:, 0], kind="stable")
                self.parts.append((block, rows[order_b].astype(np.int32)))
                self.counts.append(np.bincount(probes_bp[:, 0], minlength=coarse.k).astype(np.int32))
                self.probes.append(probes_bp[order_b])
            return ()

        self._everywhere(find)

    def _draw_inside(self, features: FeatureFolder, counts_NK: np.ndarray) -> np.ndarray:
        """As many different features of each coarse cluster as it has centers, float32 [k, d] on every rank."""
        # How many come from each block: every rank draws for some of the coarse clusters.
        shares_NK = torch.zeros(counts_NK.shape, dtype=torch.int32)
        for group in range(self.topology.rank, counts_NK.shape[1], self.topology.world_size):
            generator = np.random.default_rng([self.seed, 5, group])
            wanted = int(self.first_K[group + 1] - self.first_K[group])
            shares_n = generator.multivariate_hypergeometric(counts_NK[:, group], wanted, method="marginals")
            shares_NK[:, group] = torch.from_numpy(shares_n)
        shares_NK = self._sum(shares_NK).numpy()
        before_NK = np.cumsum(shares_NK, axis=0, dtype=np.int32) - shares_NK
        drawn_kd = torch.zeros(self.k, features.dim)

        def fill() -> tuple:
            for (block, rows), counts_K in zip(self.parts, self.counts, strict=True):
                share_K, first_K = shares_NK[block.number], self.first_K[:-1] + before_NK[block.number]
                generator = np.random.default_rng([self.seed, 6, block.number])
                drawn, to = [], []
                for group in np.flatnonzero(share_K):
                    stop, share = int(counts_K[: group + 1].sum()), int(share_K[group])
                    own = rows[stop - counts_K[group] : stop]
                    drawn.append(generator.choice(own, share, replace=False, shuffle=False))
                    to.append(np.arange(first_K[group], first_K[group] + share))
                if drawn:
                    values = read(features, (block, np.concatenate(drawn)))
                    drawn_kd[np.concatenate(to)] = torch.from_numpy(values)
            return ()

        self._everywhere(fill)
        return self._sum(drawn_kd).numpy()

    def _searcher(self, state: KMeansState):
        index = GroupedSearch(state.centers_kd, self.first_K, self.topology.device)
        if len(state.history) >= self.narrow:
            return lambda number, block_bd: index.search_several(block_bd, self.probes[number])
        return lambda number, block_bd: index.search(block_bd, self.counts[number])

    def _is_settled(self, state: KMeansState) -> bool:
        return len(state.history) > self.narrow and super()._is_settled(state)


def centers_per_group(sizes_K: np.ndarray, k: int) -> np.ndarray:
    """k centers in proportion to sizes_K: int64 [K], one at least where there is a feature, never more than features.

    By the largest remainder. Raises ValueError for k above the sum of the sizes or below the number of groups in use.
    """
    sizes_K = np.asarray(sizes_K, np.int64)
    n = int(sizes_K.sum())
    if not np.count_nonzero(sizes_K) <= k <= n:
        raise ValueError(f"{k} centers for {np.count_nonzero(sizes_K)} groups of {n} features")
    given_K = np.maximum(sizes_K * k // n, (sizes_K > 0).astype(np.int64))
    rest_K = sizes_K * k - given_K * n  # n times what a group should have beyond what it has
    step = 1 if given_K.sum() < k else -1
    heap = [(-step * int(rest), group) for group, rest in enumerate(rest_K) if sizes_K[group]]
    heapq.heapify(heap)
    for _ in range(abs(k - int(given_K.sum()))):
        while True:
            rest, group = heapq.heappop(heap)
            if given_K[group] < sizes_K[group] if step > 0 else given_K[group] > 1:
                break
        given_K[group] += step
        heapq.heappush(heap, (rest + n, group))
    return given_K
