"""The nearest centers of features, by one of three searches.

    faiss   faiss's flat index: exact on CPUs; on GPUs (faiss-gpu) with float16 centers.
    torch   blocked products and a running top-l: exact in float32 on CPUs; on GPUs the products are in bfloat16 and the
            candidates are ranked again in float32.
    ivf     faiss's inverted file over the centers: approximate, for CPUs and very large k; `nprobe` lists are looked into.

Shapes: b features of a block, k centers, d dimensions, l nearest ones wanted, t centers of a tile.
"""

import math
from typing import Protocol

import numpy as np
import torch

BACKENDS = ("faiss", "torch", "ivf")

TILE_FEATURES, TILE_CENTERS = 1024, 16_384
"""What the torch search scores at a time on a CPU: 64 MB of float32."""
GPU_TILE_FEATURES, GPU_TILE_CENTERS = 4096, 65_536
"""The same on a GPU: 0.5 GB of bfloat16."""
GROUP = 64
"""Columns whose largest score stands for them while the largest few are looked for."""
CANDIDATES = 4
"""More than are wanted that bfloat16 scores bring before they are ranked again in float32."""
CENTERS_PER_LIST = 39
"""faiss's least number of training points per list: fewer, and it warns."""


class Nearest(Protocol):
    """An index of centers."""

    def search(self, features_bd: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """(cosines float32 [b, l] falling, ids int64 [b, l]) of the `top` nearest centers of float32 unit rows."""
        ...


def index_of(
    centers_kd: np.ndarray, backend: str = "faiss", device: torch.device | str = "cpu", nprobe: int = 16
) -> Nearest:
    """An index of float32 unit centers [k, d] under the inner product. It holds a copy of them (ivf: and a few of those).

    Raises ValueError for an unknown backend.
    """
    device, centers_kd = torch.device(device), np.ascontiguousarray(centers_kd, np.float32)
    if backend == "torch":
        return TorchSearch(torch.from_numpy(centers_kd).to(device))
    import faiss  # a second of import time that only clustering needs

    k, d = centers_kd.shape
    if backend == "faiss":
        index = faiss.IndexFlatIP(d)
        if device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            config = faiss.GpuIndexFlatConfig()
            config.useFloat16, config.device = True, device.index or 0
            index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), d, config)
    elif backend == "ivf":
        lists = max(1, min(round(4 * math.sqrt(k)), k // CENTERS_PER_LIST))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(centers_kd)
        index.nprobe = min(nprobe, lists)
    else:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    index.add(centers_kd)
    return index


def exact_index(centers_kd: np.ndarray, device: torch.device | str = "cpu") -> Nearest:
    """An index that compares in float32 on any device, to check the others by."""
    device = torch.device(device)
    if device.type == "cpu":
        return index_of(centers_kd, "faiss")
    return TorchSearch(torch.from_numpy(np.ascontiguousarray(centers_kd, np.float32)).to(device), exact=True)


class TorchSearch:
    """Blocked search: never more scores at a time than one tile of them, whose memory is kept.

    exact: float32 products on GPUs, too (unless torch is told to use TF32, which nothing here does).
    """

    def __init__(self, centers_kd: torch.Tensor, exact: bool = False):
        self.centers_kd = centers_kd
        self.is_exact = exact or centers_kd.device.type == "cpu"
        self.factor_kd = centers_kd if self.is_exact else centers_kd.bfloat16()
        self._scores = torch.empty(0, dtype=self.factor_kd.dtype, device=centers_kd.device)

    def search(self, features_bd: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Nearest`."""
        best_bl, ids_bl = self.search_tensor(torch.from_numpy(features_bd), top)
        return best_bl.cpu().numpy(), ids_bl.cpu().numpy()

    def search_tensor(self, features_bd: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for unit rows of any float type on any device; the answer is on the centers' device."""
        rows = TILE_FEATURES if self.is_exact else GPU_TILE_FEATURES
        parts = [self._search(part, top) for part in features_bd.split(rows)] if len(features_bd) else []
        if not parts:
            empty = torch.zeros(0, top, device=self.centers_kd.device)
            return empty, empty.long()
        return tuple(torch.cat(found) for found in zip(*parts, strict=True))

    def _search(self, features_bd: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        features_bd = features_bd.to(self.centers_kd.device, self.centers_kd.dtype)
        wanted = min(top if self.is_exact else top + CANDIDATES, len(self.centers_kd))
        factor_bd = features_bd.to(self.factor_kd.dtype)
        best, ids = None, None
        width = TILE_CENTERS if self.is_exact else GPU_TILE_CENTERS
        for first in range(0, len(self.factor_kd), width):
            tile_td = self.factor_kd[first : first + width]
            scores_bt = torch.mm(factor_bd, tile_td.T, out=self._room(len(factor_bd), len(tile_td)))
            found, at = _largest(scores_bt, min(wanted, len(tile_td)))
            at = at + first
            if best is not None:
                found, at = torch.cat([best, found], 1), torch.cat([ids, at], 1)
                found, order = found.topk(min(wanted, found.shape[1]), dim=1)
                at = at.gather(1, order)
            best, ids = found, at
        if not self.is_exact:
            exact = torch.einsum("bd,bld->bl", features_bd, self.centers_kd[ids])
            best, order = exact.topk(min(top, exact.shape[1]), dim=1)
            ids = ids.gather(1, order)
        return best.float(), ids

    def _room(self, b: int, t: int) -> torch.Tensor:
        """Kept memory for scores [b, t]: fresh pages cost more than the search in them."""
        if self._scores.numel() < b * t:
            self._scores = self._scores.new_empty(b * t)
        return self._scores[: b * t].view(b, t)


def _largest(scores_bt: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the `wanted` largest [b, l] falling, their columns [b, l]).

    The columns of the l largest lie in the l groups with the largest maxima, which one pass finds; top-k then looks at
    those l groups alone.
    """
    b, t = scores_bt.shape
    if wanted == 1:
        best_b, at_b = _best(scores_bt)
        return best_b[:, None], at_b[:, None]
    if t % GROUP or t < 4 * GROUP * wanted:
        return scores_bt.topk(wanted, dim=1)
    groups_bgc = scores_bt.view(b, t // GROUP, GROUP)
    group_bl = groups_bgc.amax(dim=2).topk(wanted, dim=1)[1]
    candidates = groups_bgc.gather(1, group_bl[:, :, None].expand(b, wanted, GROUP)).view(b, wanted * GROUP)
    found_bl, at_bl = candidates.topk(wanted, dim=1)
    return found_bl, group_bl.gather(1, at_bl // GROUP) * GROUP + at_bl % GROUP


class GroupedSearch:
    """The nearest of the centers of a feature's own group, exact in float32.

    first_g: int64 [groups + 1]; group g has the centers first_g[g] .. first_g[g + 1], at least one where a feature is its.
    Keeps no copy of the centers on CPUs; on a GPU one in float32.
    """

    def __init__(self, centers_kd: np.ndarray, first_g: np.ndarray, device: torch.device | str = "cpu"):
        self.first_g = first_g
        self.centers_kd = torch.from_numpy(np.ascontiguousarray(centers_kd, np.float32)).to(device)

    def search(self, features_bd: np.ndarray, counts_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(cosine float32 [b], id int64 [b] among all k) of float32 unit rows that lie group by group, counts_g of each."""
        rows_bd = torch.from_numpy(features_bd).to(self.centers_kd.device)
        best_b = torch.empty(len(rows_bd), device=rows_bd.device)
        ids_b = torch.empty(len(rows_bd), dtype=torch.int64, device=rows_bd.device)
        stops_g = np.cumsum(counts_g)
        for group in np.flatnonzero(counts_g):
            first, end, stop = int(self.first_g[group]), int(self.first_g[group + 1]), int(stops_g[group])
            own_td = self.centers_kd[first:end]
            for low in range(stop - int(counts_g[group]), stop, TILE_FEATURES):
                high = min(low + TILE_FEATURES, stop)
                best_b[low:high], at_b = _best(rows_bd[low:high] @ own_td.T)
                ids_b[low:high] = at_b + first
        return best_b.cpu().numpy(), ids_b.cpu().numpy()

    def search_several(self, features_bd: np.ndarray, groups_bp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same among the centers of p groups for each feature, in any order; int [b, p]."""
        b, p = groups_bp.shape
        rows_bd = torch.from_numpy(features_bd).to(self.centers_kd.device)
        groups = groups_bp.ravel().astype(np.int16 if len(self.first_g) <= 2**15 else np.int32)  # sorted by radix: fast
        order = np.argsort(groups, kind="stable")
        stops_g = np.cumsum(np.bincount(groups, minlength=len(self.first_g) - 1))
        best, ids = np.full(b * p, -np.inf, np.float32), np.zeros(b * p, np.int64)
        for group in np.flatnonzero(np.diff(stops_g, prepend=0)):
            first, end, stop = int(self.first_g[group]), int(self.first_g[group + 1]), int(stops_g[group])
            if first == end:
                continue
            own_td = self.centers_kd[first:end]
            for low in range(int(stops_g[group - 1]) if group else 0, stop, TILE_FEATURES):
                pairs = order[low : min(low + TILE_FEATURES, stop)]
                own_rows = torch.from_numpy(pairs // p).to(rows_bd.device)
                cosine, at = _best(rows_bd.index_select(0, own_rows) @ own_td.T)
                best[pairs], ids[pairs] = cosine.cpu().numpy(), at.cpu().numpy() + first
        at_b1 = best.reshape(b, p).argmax(axis=1)[:, None]
        return tuple(np.take_along_axis(found.reshape(b, p), at_b1, 1)[:, 0] for found in (best, ids))


def _best(scores_bt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest [b], its column [b]). On CPUs numpy's argmax, ten times as fast as torch's."""
    if scores_bt.device.type != "cpu":
        return scores_bt.max(dim=1)
    at_b = torch.from_numpy(scores_bt.numpy().argmax(axis=1))
    return scores_bt.gather(1, at_b[:, None])[:, 0], at_b
