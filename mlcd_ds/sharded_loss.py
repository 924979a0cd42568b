"""The walk over a shard's matrix of logits: loss and both gradients, a chunk of images at a time, no matrix kept.

Shapes: G images of all ranks, D embedding, c classes of this shard, S sampled rows of it, T columns of the workspace (S,
at least one more, aligned), L labels an image, n images of one row chunk.

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
from torch.nn.functional import embedding_bag

from mlcd_ds import collectives
from mlcd_ds.losses import LossSpec, apply_margin, lengths, loss_from_sums
from mlcd_ds.products import Buffers, Products
from mlcd_ds.sampling import Draw
from mlcd_ds.topology import Topology

HISTOGRAM_BINS = 100
"""Bins of the cosine histograms, over [-1, 1]."""

ALIGNMENT = 16
"""Columns of the workspace are rounded up to a multiple of this: products run a third slower on rows of odd length."""

TILE_BYTES = 32 << 20
"""Of float32 logits that the fused kernels make at a time: what stays in a GPU's second-level cache."""

ROW_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Bytes of rows that are normalised or projected at a time: what stays in a CPU's cache, and on a GPU what bounds the
temporaries."""


@dataclass(frozen=True)
class RowGradient:
    """Gradient of some rows of the shard.

    rows_S: int64 local rows, distinct; values_SD: their gradients. is_whole: the rows are all rows of the shard, in order.
    """

    rows_S: torch.Tensor
    values_SD: torch.Tensor
    is_whole: bool = False


@dataclass(frozen=True)
class Walk:
    """How a shard's matrix is walked over: what all chunks share.

    shift: see PartialFC._needs_shift. fused: by the kernels of kernels/epilogue.py. learns: whether gradients are wanted;
    without them, one product is enough. shard_rows: c. lift_bits: see PartialFC._lift_bits.
    """

    spec: LossSpec
    topology: Topology
    products: Products
    buffers: Buffers
    chunk_rows: int
    shift: bool
    fused: bool
    learns: bool
    shard_rows: int
    lift_bits: int


@dataclass(frozen=True)
class UnitRows:
    """The sampled rows at unit length.

    w_TD: S rows and at least one more, aligned. The rows from S on are zero: "no positive here" points at row S, so that
    no index needs a host round trip to be filtered. factor_TD: the same as a factor of the products. norm_S: the lengths
    they had.
    """

    w_TD: torch.Tensor
    factor_TD: torch.Tensor
    norm_S: torch.Tensor


class UnitEmbeddings(torch.autograd.Function):
    """Embeddings at unit length, zero rows behind them up to `capacity`; backward works in the memory of its input."""

    @staticmethod
    def forward(ctx, embeddings_bD, capacity, dtype):
        b, D = embeddings_bD.shape
        embeddings_bD = embeddings_bD.to(dtype)
        norm_b = lengths(embeddings_bD)
        e_CD = embeddings_bD.new_empty(capacity, D)
        torch.div(embeddings_bD, norm_b[:, None], out=e_CD[:b])
        e_CD[b:] = 0
        ctx.save_for_backward(e_CD, norm_b)
        return e_CD

    @staticmethod
    def backward(ctx, d_e_CD):
        e_CD, norm_b = ctx.saved_tensors
        b = len(norm_b)
        d_bD = d_e_CD[:b]  # made for this call alone, by the reduce-scatter or by ShardedLoss
        _project(d_bD, e_CD[:b], norm_b)
        return d_bD, None, None


class ShardedLoss(torch.autograd.Function):
    """Loss and both gradients in one walk over row chunks; see the head of this file.

    e_GD: unit rows. anchor: a scalar whose gradient nobody reads. rows: of the shard, by `unit_rows`. gradients: the list
    to which backward appends the centers' RowGradient.
    """

    @staticmethod
    def forward(ctx, e_GD, anchor, rows, draw, walk, collect_stats, gradients):
        w_TD, S = rows.w_TD, len(draw.rows_S)
        d_w_TD, d_e_GD = w_TD, e_GD  # nothing is written into them
        if walk.learns:
            d_w_TD, d_e_GD = walk.buffers.hand_out("gradient", tuple(w_TD.shape), w_TD), torch.empty_like(e_GD)
        d_positive_GL = e_GD.new_empty(draw.columns_GL.shape)
        weight_G = draw.counts_G.to(e_GD.dtype) / draw.counts_G.sum().clamp_min(1)
        like = rows.factor_TD if walk.fused else e_GD
        workspace = walk.buffers.take("logits", (min(walk.chunk_rows, len(e_GD)), len(w_TD)), like).flatten()
        stats = _Statistics(e_GD, S, walk.spec) if collect_stats else None
        loss = e_GD.new_zeros(2)
        if len(e_GD) == 0 and walk.learns:
            d_w_TD.zero_()
        for first in range(0, len(e_GD), walk.chunk_rows):
            images = slice(first, min(first + walk.chunk_rows, len(e_GD)))
            given = e_GD[images], draw.columns_GL[images], weight_G[images]
            chunk = _Chunk(*given, d_e_GD[images], d_positive_GL[images], is_first=first == 0)
            loss += _walk_chunk(chunk, rows, d_w_TD, workspace, walk, stats)
        named = {"loss_positive": loss[0], "loss_negative": loss[1]}
        del workspace
        if stats is not None:
            named["summed"] = stats.finish(e_GD, w_TD[:S], draw.columns_GL, draw.counts_G)
        if not walk.learns:
            return loss.sum(), named
        lift = 2.0**walk.lift_bits
        _add_positives(draw, d_positive_GL.mul_(lift), e_GD, d_w_TD)
        d_w_SD = d_w_TD[:S]
        _project(d_w_SD, w_TD[:S], rows.norm_S * lift)
        ctx.made = d_e_GD, RowGradient(draw.rows_S, d_w_SD, is_whole=S == walk.shard_rows)
        ctx.gradients = gradients
        return loss.sum(), named

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.made is None:
            raise RuntimeError("the head's gradients are used up by the first backward: run its forward again")
        (d_e_GD, of_centers), ctx.made = ctx.made, None
        of_centers.values_SD.mul_(grad_loss)
        ctx.gradients.append(of_centers)
        return d_e_GD.mul_(grad_loss), torch.zeros_like(grad_loss), *[None] * 5


def _row_blocks(rows: torch.Tensor) -> list[slice]:
    """Blocks of ROW_BLOCK_BYTES."""
    size = max(1, ROW_BLOCK_BYTES[rows.device.type] // (rows.shape[1] * rows.element_size()))
    return [slice(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]


def unit_rows(centers_cD: torch.Tensor, rows_S: torch.Tensor, products: Products, buffers: Buffers) -> UnitRows:
    """The sampled rows (raw: centers_cD) at unit length; on a GPU the host waits for nothing."""
    S, D = len(rows_S), centers_cD.shape[1]
    w_TD = buffers.take("centers", (aligned(S + 1), D), centers_cD)
    w_TD[S:] = 0
    norm_S = centers_cD.new_empty(S)
    whole = S == len(centers_cD)
    for block in _row_blocks(w_TD[:S]):
        w_nD, norm_n = w_TD[block], norm_S[block]
        raw_nD = centers_cD[block] if whole else torch.index_select(centers_cD, 0, rows_S[block], out=w_nD)
        lengths(raw_nD, out=norm_n)
        torch.div(raw_nD, norm_n[:, None], out=w_nD)
    return UnitRows(w_TD, products.factor(w_TD), norm_S)


def _add_positives(draw: Draw, d_positive_GL: torch.Tensor, e_GD: torch.Tensor, d_w_TD: torch.Tensor) -> None:
    """Adds the positives' part of the centers' gradient: of the pairs of this shard alone, a block of them at a time."""
    columns, slopes, L = draw.columns_GL.flatten(), d_positive_GL.flatten(), d_positive_GL.shape[1]
    size = max(1, ROW_BLOCK_BYTES[e_GD.device.type] // (e_GD.shape[1] * e_GD.element_size()))
    for pairs_p in draw.pairs_P.split(size):
        of_images = e_GD.index_select(0, pairs_p // L).mul_(slopes[pairs_p, None])
        d_w_TD.index_add_(0, columns[pairs_p], of_images)


def aligned(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _project(d_w_SD: torch.Tensor, w_SD: torch.Tensor, norm_S: torch.Tensor) -> None:
    """Through w = c / |c|, in place: the part of the gradient along w does not move the direction."""
    for block in _row_blocks(d_w_SD):
        d_nD, w_nD = d_w_SD[block], w_SD[block]
        along_n = torch.linalg.vecdot(w_nD, d_nD)
        d_nD.addcmul_(w_nD, along_n[:, None], value=-1).div_(norm_S[block, None])


@dataclass(frozen=True)
class _Chunk:
    """Some images of the batch. d_e_nD and d_positive_nL: where their gradients go, see _walk_chunk."""

    e_nD: torch.Tensor
    columns_nL: torch.Tensor
    weight_n: torch.Tensor
    d_e_nD: torch.Tensor
    d_positive_nL: torch.Tensor
    is_first: bool


def _walk_chunk(chunk: _Chunk, rows: UnitRows, d_w_TD: torch.Tensor, workspace, walk: Walk, stats) -> torch.Tensor:
    """One row chunk: returns its [positive, negative] part of the loss, and writes its gradients.

    d_e_nD becomes the embeddings' gradient, d_positive_nL d loss / d cosine of the positives, zero where there is none; the
    negatives' part of the centers' gradient is added to d_w_TD.
    """
    spec, topology, products = walk.spec, walk.topology, walk.products
    e_nD, columns_nL, weight_n, d_e_nD = chunk.e_nD, chunk.columns_nL, chunk.weight_n, chunk.d_e_nD
    w_TD, factor_TD = rows.w_TD, rows.factor_TD
    n, T, S = len(e_nD), len(w_TD), len(rows.norm_S)
    here_nL = columns_nL != S
    exponentiate = _exponentiate_fused if walk.fused else _exponentiate
    terms = exponentiate(e_nD, columns_nL, weight_n, w_TD, factor_TD, workspace[: n * T].view(n, T), walk, S, stats)

    value_nL, slope_nL = apply_margin(terms.cosine_nL, spec)
    minus_s_nL = torch.where(here_nL, -spec.scale * value_nL, -torch.inf)
    # Where exp may leave the dtype's range, each shard keeps its sums relative to its own maxima: minus infinity where it
    # has no term, so that its factors exp(maximum - ...) below are zero.
    own_2n = e_nD.new_zeros(2, n)
    if walk.shift:
        own_2n = torch.stack([terms.maximum_n, minus_s_nL.amax(dim=1)])
        minus_s_nL.sub_(own_2n[1].masked_fill(own_2n[1] == -torch.inf, 0)[:, None])
    sums_2n = torch.stack([terms.sum_n, minus_s_nL.exp().sum(dim=1)])
    common_2n = own_2n
    if walk.shift:
        common_2n = collectives.max_(own_2n.clone(), topology)
        common_2n.masked_fill_(common_2n == -torch.inf, 0)
        sums_2n.mul_((own_2n - common_2n).exp())
    summing = collectives.start_sum(sums_2n, topology)
    if walk.learns:
        products.put(terms.factor_nT, factor_TD, d_e_nD)
    summing.wait()

    log_2n = sums_2n.log() + common_2n
    two = loss_from_sums(spec.objective, log_2n[0], log_2n[1])
    losses_2 = torch.stack([two.positive_G @ weight_n, two.negative_G @ weight_n])
    if not walk.learns:
        return losses_2
    # d loss / d cosine, the mean's weight included. A row that is no image has weight zero. The negatives' number is lifted
    # into the middle of the dtype's range; the centers' gradient stays so until the end.
    negative_n = (two.log_negative_weight_G + own_2n[0] + walk.lift_bits * math.log(2)).exp() * (weight_n * spec.scale)
    positive_nL = minus_s_nL + (two.log_positive_weight_G + own_2n[1])[:, None]
    torch.mul(positive_nL.exp_(), -(weight_n * spec.scale)[:, None], out=chunk.d_positive_nL)
    if spec.margin_gradient == "exact":
        chunk.d_positive_nL.mul_(slope_nL)
    d_e_nD.mul_(negative_n[:, None]).mul_(2.0**-walk.lift_bits)
    make = products.put if chunk.is_first else products.add
    make(terms.factor_nT.T, products.factor(e_nD * negative_n[:, None]), d_w_TD)
    # Where an image has no positive here its column is S, a row of zeros, and its slope zero.
    d_e_nD.add_(embedding_bag(columns_nL, w_TD, mode="sum", per_sample_weights=chunk.d_positive_nL))
    return losses_2


@dataclass(frozen=True)
class _Terms:
    """What a chunk's logits come to.

    cosine_nL: of the positives, anything where there is none. factor_nT: exp(s_j) of the negatives as a factor of the
    products, zero elsewhere. sum_n: its row sums. Both relative to exp(maximum_n) where that is not None.
    """

    cosine_nL: torch.Tensor
    factor_nT: torch.Tensor
    sum_n: torch.Tensor
    maximum_n: torch.Tensor | None = None


def _exponentiate(e_nD, columns_nL, weight_n, w_TD, factor_TD, logits_nT, walk: Walk, S: int, stats) -> _Terms:
    """In torch, in place in the workspace `logits_nT`."""
    spec, products = walk.spec, walk.products
    products.put(products.factor(e_nD * spec.scale), factor_TD.T, logits_nT)
    cosine_nL = logits_nT.gather(1, columns_nL) / spec.scale
    if stats is not None:
        stats.add(logits_nT[:, : S + 1], cosine_nL, columns_nL, weight_n)
    if spec.negative_filter is not None:
        for block in _row_blocks(logits_nT):
            part = logits_nT[block]
            part.masked_fill_(part > spec.scale * spec.negative_filter, -torch.inf)
    # The positives leave the negative sum before it is summed (exp(-inf) = 0), never by subtraction; so do the zero rows.
    logits_nT.scatter_(1, columns_nL, -torch.inf)
    logits_nT[:, S:] = -torch.inf
    maximum_n = None
    if walk.shift:
        maximum_n = logits_nT.amax(dim=1)
        logits_nT.sub_(maximum_n.masked_fill(maximum_n == -torch.inf, 0)[:, None])
    exp_nT = logits_nT.exp_()
    return _Terms(cosine_nL, products.factor(exp_nT), exp_nT.sum(dim=1), maximum_n)


def _exponentiate_fused(e_nD, columns_nL, weight_n, w_TD, factor_TD, out_nT, walk: Walk, S: int, stats) -> _Terms:
    """By kernels.epilogue: the logits exist a tile of columns at a time, small enough for a GPU's cache."""
    from mlcd_ds.kernels.epilogue import exponentials

    spec, products = walk.spec, walk.products
    n, T = out_nT.shape
    scaled_nD = products.factor(e_nD * spec.scale)
    # Of the positives from unrounded factors: n L products instead of a gather from a matrix that is not there.
    cosine_nL = torch.stack([torch.linalg.vecdot(e_nD, w_TD[columns_n]) for columns_n in columns_nL.T], dim=1)
    if stats is not None:
        rows = slice(0, 0 if stats.seen else stats.rows)
        stats.add(spec.scale * e_nD[rows] @ w_TD[: S + 1].T, cosine_nL, columns_nL, weight_n)
    largest = None if spec.negative_filter is None else spec.scale * spec.negative_filter
    width = min(T, max(ALIGNMENT, TILE_BYTES // (4 * n) // ALIGNMENT * ALIGNMENT))
    tile = walk.buffers.take("tile", (n, width), e_nD).flatten()
    sum_n = e_nD.new_zeros(n)
    for first in range(0, T, width):
        stop = min(first + width, T)
        logits_nt = tile[: n * (stop - first)].view(n, stop - first)
        products.put(scaled_nD, factor_TD[first:stop].T, logits_nt)
        sum_n += exponentials(logits_nt, out_nT, columns_nL, first, S, largest)
    return _Terms(cosine_nL, out_nT, sum_n)


class _Statistics:
    """Sums over this shard's pairs: cosines of positives and negatives, their numbers, and histograms over [-1, 1].

    The mean of the negatives costs no pass over the matrix: the sum over all pairs is (sum of e) . (sum of w).
    The negatives' histogram is that of the first images alone, at most 64 and of at most MAX_PAIRS pairs: a picture, not a
    sum to reconcile.
    """

    MAX_ROWS, MAX_PAIRS = 64, 1 << 22

    def __init__(self, e_GD: torch.Tensor, S: int, spec: LossSpec):
        self.spec = spec
        self.rows = max(1, min(self.MAX_ROWS, self.MAX_PAIRS // max(1, S)))
        self.positive = e_GD.new_zeros(2)
        self.histogram_2H = e_GD.new_zeros(2, HISTOGRAM_BINS)
        self.seen = False

    def add(self, logits_nS1, cosine_nL, columns_nL, weight_n) -> None:
        """logits_nS1: of at least the first `rows` images, with one column more than there are rows."""
        here_nL = (columns_nL != logits_nS1.shape[1] - 1) & (weight_n > 0)[:, None]
        self.positive += torch.stack([torch.where(here_nL, cosine_nL, 0).sum(), here_nL.sum()])
        # Bin -1 catches what is not to be counted.
        self._count(0, torch.where(here_nL, cosine_nL, -2))
        if not self.seen:
            self.seen = True
            cosine = logits_nS1[: self.rows] / self.spec.scale
            cosine.scatter_(1, columns_nL[: self.rows], -2)
            cosine[:, -1] = -2
            self._count(1, cosine.masked_fill_((weight_n[: self.rows] == 0)[:, None], -2))

    def _count(self, which: int, cosine: torch.Tensor) -> None:
        cosine = cosine.nan_to_num(nan=-2)  # of a step that will be skipped: what is no number has no bin
        bin_of = ((cosine.clamp(-2, 1) + 1) * (HISTOGRAM_BINS / 2)).floor().clamp(-1, HISTOGRAM_BINS - 1).long() + 1
        ones = torch.ones((), dtype=self.histogram_2H.dtype, device=bin_of.device).expand(bin_of.numel())
        counts = self.histogram_2H.new_zeros(HISTOGRAM_BINS + 1).scatter_add_(0, bin_of.flatten(), ones)
        self.histogram_2H[which] += counts[1:]

    def finish(self, e_GD, w_SD, columns_GL, counts_G) -> torch.Tensor:
        everything = (e_GD * counts_G[:, None]).sum(dim=0) @ w_SD.sum(dim=0)
        pairs = counts_G.sum() * len(w_SD)
        negative = torch.stack([everything - self.positive[0], pairs.to(e_GD.dtype) - self.positive[1]])
        sums = torch.stack([self.positive[0], negative[0], self.positive[1], negative[1]])
        return torch.cat([sums, self.histogram_2H.flatten()])
