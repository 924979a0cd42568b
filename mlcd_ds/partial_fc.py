"""This rank's shard of the class centers: sample, normalise, loss and gradients, never the whole logits matrix.

Shapes: b images of this rank, G = W*b images of all ranks, D embedding, K classes, c classes of this shard, S sampled
rows of this shard, L labels an image, n images of one row chunk.

How a step runs. The logits of all images against the sampled rows would be [G, S]. Instead a workspace of bounded bytes
holds n images' rows at a time. A chunk's gradient with respect to its logits is exp(logit) times one number per image
(losses.loss_from_sums), which needs the sums over ALL shards. So each chunk
  1. computes its logits (product 1), takes the positives out, exponentiates in place, sums each row;
  2. starts the all-reduce of these sums, and meanwhile multiplies the exponentials with the centers (product 2): the
     embeddings' gradient up to that one number per image, by which the [n, D] result is multiplied afterwards;
  3. multiplies the exponentials, transposed, with the embeddings times that number (product 3): the centers' gradient.
Nothing is recomputed and nothing of size [G, S] is kept: the gradients are ready when the loss is. `backward` then only
scales them.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from mlcd_ds import collectives
from mlcd_ds.batch import NO_IMAGE
from mlcd_ds.config import HeadConfig
from mlcd_ds.errors import ConfigError
from mlcd_ds.losses import NORM_FLOOR, LossSpec, apply_margin, labels_for, loss_from_sums
from mlcd_ds.partition import ClassPartition
from mlcd_ds.sampling import BLOCK, ClassSampler
from mlcd_ds.topology import Topology

_DEFAULTS = HeadConfig()

HISTOGRAM_BINS = 100
"""Bins of the cosine histograms, over [-1, 1]."""

INIT_STD = 0.01
"""Standard deviation of the elements of random initial centers, as in the published PartialFC."""


@dataclass(frozen=True)
class HeadOutput:
    """loss: scalar, the mean over the GLOBAL batch, the same on every rank. stats: tensors on the device, for monitoring."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


@dataclass(frozen=True)
class RowGradient:
    """Gradient of some rows of the shard.

    rows_S: int64 local rows, distinct; values_SD: their gradients. is_whole: the rows are all rows of the shard, in order.
    """

    rows_S: torch.Tensor
    values_SD: torch.Tensor
    is_whole: bool = False


class PartialFC(nn.Module):
    """The class head of one rank: `c` of the `num_classes` centers, sharded by class over all ranks of `topology`.

    It stands OUTSIDE the DeepSpeed engine, which would broadcast rank 0's centers over everybody's and average their
    gradients. After `loss.backward()` (or `engine.backward(loss)`) `take_gradients()` hands over the sampled rows'
    gradients, one item per backward; `optim.RowAdamW` applies them.

    Collectives of a step: one all-gather of the embeddings (G*D elements), one of the labels (G*L int32), one all-reduce
    of [2, n] partial sums per row chunk (two, one of them a max, where scale + log(K) leaves the dtype's range), and on
    the way back one reduce-scatter of the embeddings' gradient (G*D elements). With `collect_stats` one more all-reduce
    of a short vector; without `capacity` one more all-gather of one number (and a host round trip) to learn the sizes.

    num_classes: K. embed_dim: D. init_centers: float [c, D], this shard's rows, or None for random rows that depend on
    (seed, global row) only. dtype: of the centers, and of all sums. precision: of the factors of the three products,
    "float32" (the centers' dtype) or "bfloat16", accumulated in float32 either way. The other arguments are those of
    config.HeadConfig.
    Raises ConfigError for fewer classes than ranks, an unknown objective, or centers of another shape.
    """

    SETTINGS = (
        *("objective", "sample_rate", "scale", "margin", "margin_type", "margin_gradient", "negative_filter"),
        "workspace_mb",
    )
    """The arguments that are fields of config.HeadConfig."""

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        topology: Topology | None = None,
        objective: str = _DEFAULTS.objective,
        sample_rate: float = _DEFAULTS.sample_rate,
        scale: float = _DEFAULTS.scale,
        margin: float = _DEFAULTS.margin,
        margin_type: str = _DEFAULTS.margin_type,
        margin_gradient: str = _DEFAULTS.margin_gradient,
        negative_filter: float | None = _DEFAULTS.negative_filter,
        workspace_mb: float = _DEFAULTS.workspace_mb,
        seed: int = 0,
        init_centers: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        precision: str = "float32",
    ):
        super().__init__()
        self.topology = topology or Topology.single()
        self.partition = ClassPartition(num_classes, self.topology.world_size)
        self.embed_dim = embed_dim
        self.spec = LossSpec(objective, scale, margin, margin_type, margin_gradient, negative_filter)
        self.products = {"float32": _Products, "bfloat16": _BFloat16Products}[precision]()
        self.workspace_bytes = int(workspace_mb * 2**20)
        shard = self.topology.rank
        self.start, self.stop = self.partition.start(shard), self.partition.stop(shard)
        self.sampler = ClassSampler(self.partition, shard, sample_rate, seed)
        if init_centers is None:
            init_centers = random_rows(self.start, self.stop, num_classes, embed_dim, seed)
        elif tuple(init_centers.shape) != (self.stop - self.start, embed_dim):
            raise ConfigError(
                f"initial centers have shape {tuple(init_centers.shape)}, but this rank's shard of {num_classes} classes "
                f"and the encoder's embedding need {(self.stop - self.start, embed_dim)}"
            )
        self.centers = nn.Parameter(init_centers.to(self.topology.device, dtype), requires_grad=False)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extra_repr(self) -> str:
        return f"rows {self.start}..{self.stop} of {self.partition.num_classes}, D={self.embed_dim}, {self.spec}"

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        *,
        step: int,
        capacity: int | None = None,
        collect_stats: bool = False,
    ) -> HeadOutput:
        """Loss of the global batch.

        embeddings: [b, D] of this rank, any floating dtype, not normalised. labels: int64 [b, L], global classes, nearest
        first, NO_LABEL where there is none; rows that begin with NO_IMAGE take no part in anything. step: selects the
        negatives. capacity: the same number >= b on every rank (usually the micro-batch), or None to ask the others.
        Raises ConfigError when shapes do not fit. Labels >= K are the loader's to refuse: here they would need a host
        round trip in every step, and are ignored.
        """
        if embeddings.shape != (len(labels), self.embed_dim):
            raise ConfigError(
                f"embeddings {tuple(embeddings.shape)} do not fit {len(labels)} label rows and D={self.embed_dim}"
            )
        capacity = self._largest_batch(len(labels)) if capacity is None else capacity
        dtype = self.centers.dtype
        e_bD = nn.functional.normalize(embeddings.to(dtype), dim=1, eps=NORM_FLOOR)
        missing = capacity - len(labels)
        if missing < 0:
            raise ConfigError(f"capacity {capacity} is less than this rank's {len(labels)} images")
        if missing:
            e_bD = nn.functional.pad(e_bD, (0, 0, 0, missing))
            labels = nn.functional.pad(labels, (0, 0, 0, missing), value=NO_IMAGE)
        e_GD = collectives.gather_rows(e_bD, self.topology)
        labels_GL = collectives.all_gather(labels.to(torch.int32), self.topology).long()
        counts_G = labels_GL[:, 0] != NO_IMAGE
        labels_GL = labels_for(self.spec.objective, labels_GL)

        rows_S = self.sampler.draw(labels_GL, step)
        centers_SD = self.centers.detach()[rows_S].requires_grad_(torch.is_grad_enabled())
        # Where each label stands among the sampled rows; S where it does not (no label, or another shard's).
        position_c = torch.full((self.stop - self.start + 1,), len(rows_S), device=rows_S.device)
        position_c[rows_S] = torch.arange(len(rows_S), device=rows_S.device)
        here_GL = (labels_GL >= self.start) & (labels_GL < self.stop)
        columns_GL = position_c[torch.where(here_GL, labels_GL - self.start, self.stop - self.start)]

        chunk_rows = self._chunk_rows(labels_GL.numel())
        needs_shift = self._needs_shift(labels_GL.shape[1])
        loss, stats = _ShardedLoss.apply(
            e_GD,
            centers_SD,
            columns_GL,
            counts_G,
            _Walk(self.spec, self.topology, self.products, chunk_rows, needs_shift),
            collect_stats,
        )
        if centers_SD.requires_grad:
            self._pending.append((rows_S, centers_SD))
        return HeadOutput(loss, self._name_stats(stats, rows_S, here_GL, labels_GL) if collect_stats else {})

    def take_gradients(self) -> list[RowGradient]:
        """The gradients made since the last call, one item per backward, and forgets them."""
        pending, self._pending = self._pending, []
        return [
            RowGradient(rows_S, rows.grad, is_whole=len(rows_S) == len(self.centers))
            for rows_S, rows in pending
            if rows.grad is not None
        ]

    def _needs_shift(self, labels_per_image: int) -> bool:
        """Whether a sum of exponentials may leave the dtype's range, so that sums are kept relative to a maximum.

        The largest terms: K negatives of cosine 1, or all positives of an image at cosine -1, where a margin adds more.
        """
        extra = {"arc": self.spec.margin * math.sin(self.spec.margin), "cos": self.spec.margin, "none": 0.0}
        negatives = self.spec.scale + math.log(self.partition.num_classes)
        positives = self.spec.scale * (1 + extra[self.spec.margin_type]) + math.log(labels_per_image)
        return max(negatives, positives) > math.log(torch.finfo(self.centers.dtype).max) - 1

    def _largest_batch(self, rows: int) -> int:
        if not self.topology.is_distributed:
            return rows
        sizes = collectives.all_gather(torch.tensor([rows], device=self.centers.device), self.topology)
        return int(sizes.max())

    def _chunk_rows(self, num_labels: int) -> int:
        """Images per chunk so that the logits stay within the workspace; from numbers that all ranks share."""
        row_bytes = (self.sampler.max_rows(num_labels) + 1) * self.centers.element_size()
        return max(1, self.workspace_bytes // row_bytes)

    def _name_stats(self, stats, rows_S, here_GL, labels_GL) -> dict[str, torch.Tensor]:
        """One all-reduce makes the shards' statistics those of the whole head."""
        own = torch.zeros(self.stop - self.start + 1, dtype=torch.bool, device=rows_S.device)
        own[torch.where(here_GL, labels_GL - self.start, self.stop - self.start)] = True
        counts = torch.stack([torch.tensor(len(rows_S), device=rows_S.device), own[:-1].sum()])
        summed = collectives.sum_(torch.cat([stats["summed"], counts.to(stats["summed"].dtype)]), self.topology)
        bins = HISTOGRAM_BINS
        positive, negative, pairs_p, pairs_n = summed[:4]
        return {
            "loss_positive": stats["loss_positive"],
            "loss_negative": stats["loss_negative"],
            "cosine_positive": positive / pairs_p.clamp_min(1),
            "cosine_negative": negative / pairs_n.clamp_min(1),
            "histogram_positive": summed[4 : 4 + bins],
            "histogram_negative": summed[4 + bins : 4 + 2 * bins],
            "sampled_rows": summed[-2],
            "positive_rows": summed[-1],
        }


def random_rows(start: int, stop: int, num_classes: int, dim: int, seed: int) -> torch.Tensor:
    """Initial centers [stop-start, D] float32: a function of (seed, global row), so every world size starts alike."""
    rows = []
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        values = torch.randn(min(BLOCK, num_classes - first), dim, generator=generator) * INIT_STD
        rows.append(values[max(start - first, 0) : stop - first])
    return torch.cat(rows)


class _Products:
    """The three matrix products, in the dtype of their factors."""

    def put(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """out = a @ b."""
        torch.mm(a, b, out=out)

    def add(self, a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        """into += a @ b."""
        into.addmm_(a, b)


class _BFloat16Products(_Products):
    """Factors rounded to bfloat16, products accumulated and returned in float32.

    On a CPU the rounded factors are multiplied in float32: the same numbers, and faster than its bfloat16 products.
    """

    def put(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        a, b = a.bfloat16(), b.bfloat16()
        if out.is_cuda:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def add(self, a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        product = torch.empty_like(into)
        self.put(a, b, product)
        into += product


@dataclass(frozen=True)
class _Walk:
    """How a shard's matrix is walked over: what all chunks share. shift: see PartialFC._needs_shift."""

    spec: LossSpec
    topology: Topology
    products: _Products
    chunk_rows: int
    shift: bool


class _ShardedLoss(torch.autograd.Function):
    """Loss and both gradients in one walk over row chunks; see the head of this file.

    e_GD: unit rows. centers_SD: raw rows, normalised here. columns_GL: the column of each positive, S for none here.
    counts_G: bool, false for rows that are no image.
    """

    @staticmethod
    def forward(ctx, e_GD, centers_SD, columns_GL, counts_G, walk, collect_stats):
        S, D = centers_SD.shape
        norm_S = centers_SD.norm(dim=1).clamp_min(NORM_FLOOR)
        # One zero row more: it is what "no positive here" points at, so no index needs a host round trip to be filtered.
        w_TD = centers_SD.new_zeros(S + 1, D)
        torch.div(centers_SD, norm_S[:, None], out=w_TD[:S])
        d_w_TD = torch.zeros_like(w_TD)
        d_e_GD = torch.zeros_like(e_GD)
        weight_G = counts_G.to(e_GD.dtype) / counts_G.sum().clamp_min(1)
        workspace = e_GD.new_empty(min(walk.chunk_rows, len(e_GD)) * (S + 1))
        stats = _Statistics(e_GD, walk.spec) if collect_stats else None
        loss = e_GD.new_zeros(2)
        for first in range(0, len(e_GD), walk.chunk_rows):
            rows = slice(first, min(first + walk.chunk_rows, len(e_GD)))
            part = e_GD[rows], columns_GL[rows], weight_G[rows], d_e_GD[rows]
            loss += _chunk(*part, w_TD, d_w_TD, workspace, walk, stats)
        # Through w = c / |c|: the part of the gradient along w does not move the direction.
        w_SD, d_w_SD = w_TD[:S], d_w_TD[:S]
        along_S = torch.linalg.vecdot(w_SD, d_w_SD)
        d_w_SD.addcmul_(w_SD, along_S[:, None], value=-1).div_(norm_S[:, None])
        ctx.gradients = d_e_GD, d_w_SD
        named = {"loss_positive": loss[0], "loss_negative": loss[1]}
        if stats is not None:
            named["summed"] = stats.finish(e_GD, w_SD, columns_GL, counts_G)
        return loss.sum(), named

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients are used up by the first backward: run its forward again")
        (d_e_GD, d_w_SD), ctx.gradients = ctx.gradients, None
        return d_e_GD.mul_(grad_loss), d_w_SD.mul_(grad_loss), *[None] * 4


def _chunk(e_nD, columns_nL, weight_n, d_e_nD, w_TD, d_w_TD, workspace, walk: _Walk, stats) -> torch.Tensor:
    """One row chunk: adds its gradients into d_e_nD and d_w_TD, returns its [positive, negative] part of the mean loss."""
    spec, topology, shift = walk.spec, walk.topology, walk.shift
    n, T = len(e_nD), len(w_TD)
    none_here = T - 1
    logits_nT = workspace[: n * T].view(n, T)
    walk.products.put(e_nD * spec.scale, w_TD.T, logits_nT)
    cosine_nL = logits_nT.gather(1, columns_nL) / spec.scale
    here_nL = columns_nL != none_here
    if stats is not None:
        stats.add(logits_nT, cosine_nL, columns_nL, here_nL, weight_n)
    if spec.negative_filter is not None:
        logits_nT.masked_fill_(logits_nT > spec.scale * spec.negative_filter, -torch.inf)
    # The positives leave the negative sum before it is summed (exp(-inf) = 0), never by subtraction; so does the zero row.
    logits_nT.scatter_(1, columns_nL, -torch.inf)
    logits_nT[:, none_here] = -torch.inf

    value_nL, slope_nL = apply_margin(cosine_nL, spec)
    minus_s_nL = torch.where(here_nL, -spec.scale * value_nL, -torch.inf)
    # Where exp may leave the dtype's range, each shard keeps its sums relative to its own maxima: minus infinity where it
    # has no term, so that its factors exp(maximum - ...) below are zero.
    own_2n = e_nD.new_zeros(2, n)
    if shift:
        own_2n = torch.stack([logits_nT.amax(dim=1), minus_s_nL.amax(dim=1)])
        finite_2n = own_2n.masked_fill(own_2n == -torch.inf, 0)
        logits_nT.sub_(finite_2n[0, :, None])
        minus_s_nL.sub_(finite_2n[1, :, None])
    exp_nT = logits_nT.exp_()
    sums_2n = torch.stack([exp_nT.sum(dim=1), minus_s_nL.exp().sum(dim=1)])
    common_2n = own_2n
    if shift:
        common_2n = collectives.max_(own_2n.clone(), topology)
        common_2n.masked_fill_(common_2n == -torch.inf, 0)
        sums_2n.mul_((own_2n - common_2n).exp())
    summing = collectives.start_sum(sums_2n, topology)
    walk.products.put(exp_nT, w_TD, d_e_nD)
    summing.wait()

    log_2n = sums_2n.log() + common_2n
    two = loss_from_sums(spec.objective, log_2n[0], log_2n[1])
    # d loss / d cosine, the mean's weight included. A row that is no image has weight zero.
    negative_n = (two.log_negative_weight_G + own_2n[0]).exp() * (weight_n * spec.scale)
    positive_nL = (minus_s_nL + (two.log_positive_weight_G + own_2n[1])[:, None]).exp() * -(weight_n * spec.scale)[
        :, None
    ]
    if spec.margin_gradient == "exact":
        positive_nL = positive_nL * slope_nL
    d_e_nD.mul_(negative_n[:, None])
    walk.products.add(exp_nT.T, e_nD * negative_n[:, None], d_w_TD)
    for columns_n, positive_n in zip(columns_nL.T, positive_nL.T, strict=True):
        d_e_nD.addcmul_(w_TD[columns_n], positive_n[:, None])
        d_w_TD.index_add_(0, columns_n, e_nD * positive_n[:, None])
    return torch.stack([two.positive_G @ weight_n, two.negative_G @ weight_n])


class _Statistics:
    """Sums over this shard's pairs: cosines of positives and negatives, their numbers, and histograms over [-1, 1].

    The mean of the negatives costs no pass over the matrix: the sum over all pairs is (sum of e) . (sum of w).
    The negatives' histogram is that of the first chunk, up to 64 images of it: a picture, not a sum to reconcile.
    """

    ROWS = 64

    def __init__(self, e_GD: torch.Tensor, spec: LossSpec):
        self.spec = spec
        self.positive = e_GD.new_zeros(2)
        self.histogram_2H = e_GD.new_zeros(2, HISTOGRAM_BINS)
        self.seen = False

    def add(self, logits_nT, cosine_nL, columns_nL, here_nL, weight_n) -> None:
        here_nL = here_nL & (weight_n > 0)[:, None]
        self.positive += torch.stack([torch.where(here_nL, cosine_nL, 0).sum(), here_nL.sum()])
        # Bin -1 catches what is not to be counted.
        self._count(0, torch.where(here_nL, cosine_nL, -2))
        if not self.seen:
            self.seen = True
            cosine = logits_nT[: self.ROWS] / self.spec.scale
            cosine.scatter_(1, columns_nL[: self.ROWS], -2)
            cosine[:, -1] = -2
            self._count(1, cosine.masked_fill_((weight_n[: self.ROWS] == 0)[:, None], -2))

    def _count(self, which: int, cosine: torch.Tensor) -> None:
        bin_of = ((cosine.clamp(-2, 1) + 1) * (HISTOGRAM_BINS / 2)).floor().clamp(-1, HISTOGRAM_BINS - 1).long() + 1
        counts = torch.bincount(bin_of.flatten(), minlength=HISTOGRAM_BINS + 1)[1:]
        self.histogram_2H[which] += counts.to(self.histogram_2H.dtype)

    def finish(self, e_GD, w_SD, columns_GL, counts_G) -> torch.Tensor:
        everything = (e_GD * counts_G[:, None]).sum(dim=0) @ w_SD.sum(dim=0)
        pairs = counts_G.sum() * len(w_SD)
        negative = torch.stack([everything - self.positive[0], pairs.to(e_GD.dtype) - self.positive[1]])
        sums = torch.stack([self.positive[0], negative[0], self.positive[1], negative[1]])
        return torch.cat([sums, self.histogram_2H.flatten()])
