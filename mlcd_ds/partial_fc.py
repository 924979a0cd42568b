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
from mlcd_ds.kernels import check_available
from mlcd_ds.losses import NORM_FLOOR, LossSpec, apply_margin, labels_for, loss_from_sums
from mlcd_ds.partition import ClassPartition
from mlcd_ds.sampling import ClassSampler
from mlcd_ds.topology import Topology

_DEFAULTS = HeadConfig()

HISTOGRAM_BINS = 100
"""Bins of the cosine histograms, over [-1, 1]."""

INIT_BLOCK = 1024
"""Rows that one generator makes: part of what (seed, global row) means."""

ALIGNMENT = 16
"""Columns of the workspace are rounded up to a multiple of this: products run a third slower on rows of odd length."""

WORKSPACE_BYTES = 128 << 20
"""Of logits that exist at one time, where `workspace_mb` leaves it open; more where they are less than MIN_CHUNK images."""

MIN_CHUNK = 512
"""Images a product needs at least to run at full speed."""

MAX_WORKSPACE_BYTES = 1_400_000_000
"""What a workspace of MIN_CHUNK images may grow to; with more rows than that holds, chunks have fewer images."""

TILE_BYTES = 32 << 20
"""Of float32 logits that the fused kernels make at a time: what stays in a GPU's second-level cache."""

ROW_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Bytes of rows that are normalised or projected at a time: what stays in a CPU's cache, and on a GPU what bounds the
temporaries."""

INIT_STD = 0.01
"""Standard deviation of the elements of random initial centers, as in the published PartialFC."""


@dataclass(frozen=True)
class HeadOutput:
    """loss: scalar, the mean over the GLOBAL batch, the same on every rank. stats: tensors on the device, for monitoring."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Draw:
    """Which images and classes meet in a micro-step, see PartialFC.draw.

    labels_GL: int64, what is positive for each image of the global batch. counts_G: bool, false in rows that are no image.
    rows_S: int64, the sampled rows of this shard. columns_GL: where each label stands among them, S where it does not (no
    label, or another shard's). capacity: images a rank, padding included.
    """

    labels_GL: torch.Tensor
    counts_G: torch.Tensor
    rows_S: torch.Tensor
    columns_GL: torch.Tensor
    capacity: int


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

    Collectives of a micro-step (G images, D columns, L labels): one all-gather of the labels (4 G L bytes), one of the
    embeddings (4 G D bytes, 2 G D in bfloat16), one all-reduce of [2, n] partial sums per row chunk (8 G bytes over all
    chunks; twice that where scale + log(K) leaves float32's range, for the maxima), and on the way back one reduce-scatter
    of the embeddings' gradient (4 G D bytes). The bytes do not depend on the number of ranks, nor does the number, but for
    the chunks: smaller shards have fewer. With `collect_stats` one more all-reduce of a short vector; without `capacity`
    one more all-gather of one number (and a host round trip) to learn the sizes.

    num_classes: K. embed_dim: D. init_centers: float [c, D], this shard's rows, or None for random rows that depend on
    (seed, global row) only. dtype: of the centers, and of all sums. precision: of the factors of the three products,
    "float32" (the centers' dtype) or "bfloat16", accumulated in float32 either way. gather_precision: of the embeddings on
    their way to the other ranks; their gradient comes back in the centers' dtype. kernels: "torch", or "triton" for
    float32 centers and sums that need no maximum. The other arguments are those of config.HeadConfig.
    Raises ConfigError for fewer classes than ranks, an unknown objective, or centers of another shape.
    """

    SETTINGS = (
        *("objective", "sample_rate", "sample_budget", "scale", "margin", "margin_type", "margin_gradient"),
        *("negative_filter", "workspace_mb"),
    )
    """The arguments that are fields of config.HeadConfig."""

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        topology: Topology | None = None,
        objective: str = _DEFAULTS.objective,
        sample_rate: float = _DEFAULTS.sample_rate,
        sample_budget: str = _DEFAULTS.sample_budget,
        scale: float = _DEFAULTS.scale,
        margin: float = _DEFAULTS.margin,
        margin_type: str = _DEFAULTS.margin_type,
        margin_gradient: str = _DEFAULTS.margin_gradient,
        negative_filter: float | None = _DEFAULTS.negative_filter,
        workspace_mb: float | None = _DEFAULTS.workspace_mb,
        seed: int = 0,
        init_centers: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        precision: str = "float32",
        gather_precision: str = "float32",
        kernels: str = "torch",
    ):
        super().__init__()
        self.topology = topology or Topology.single()
        self.partition = ClassPartition(num_classes, self.topology.world_size)
        self.embed_dim = embed_dim
        self.spec = LossSpec(objective, scale, margin, margin_type, margin_gradient, negative_filter)
        self._check(sample_budget, precision, gather_precision, kernels, dtype)
        self.products = {"float32": _Products, "bfloat16": _BFloat16Products}[precision]()
        self.gather_dtype = {"float32": dtype, "bfloat16": torch.bfloat16}[gather_precision]
        self.workspace_mb = workspace_mb
        self.kernels = kernels
        shard = self.topology.rank
        self.start, self.stop = self.partition.start(shard), self.partition.stop(shard)
        self.sampler = ClassSampler(self.partition, shard, sample_rate, seed, sample_budget)
        if init_centers is None:
            init_centers = random_rows(self.start, self.stop, num_classes, embed_dim, seed)
        elif tuple(init_centers.shape) != (self.stop - self.start, embed_dim):
            raise ConfigError(
                f"initial centers have shape {tuple(init_centers.shape)}, but this rank's shard of {num_classes} classes "
                f"and the encoder's embedding need {(self.stop - self.start, embed_dim)}"
            )
        self.centers = nn.Parameter(init_centers.to(self.topology.device, dtype), requires_grad=False)
        self._gradients: list[RowGradient] = []
        self._memory = _Buffers(self.topology.device)

    def _check(self, sample_budget: str, precision: str, gather_precision: str, kernels: str, dtype) -> None:
        for name, value, allowed in (
            ("sample_budget", sample_budget, ("negatives", "total")),
            ("precision", precision, ("float32", "bfloat16")),
            ("gather_precision", gather_precision, ("float32", "bfloat16")),
            ("kernels", kernels, ("torch", "triton")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        if kernels == "triton":
            if dtype != torch.float32:
                raise ConfigError(f"kernels='triton' work on float32 centers, these are {dtype}: use kernels='torch'")
            check_available(self.topology.device)

    def extra_repr(self) -> str:
        return f"rows {self.start}..{self.stop} of {self.partition.num_classes}, D={self.embed_dim}, {self.spec}"

    def draw(self, labels: torch.Tensor, *, step: int, capacity: int | None = None) -> Draw:
        """Gathers the labels of a micro-step and draws its classes; needs no embeddings.

        So it can run before the encoder does, for all micro-steps of a step at once, when the device has nothing else to
        do: `nonzero` makes the host wait for the number of rows, and nothing later does. Arguments as for `forward`.
        """
        labels = labels.to(self.centers.device, non_blocking=True)
        capacity = self._largest_batch(len(labels)) if capacity is None else capacity
        missing = capacity - len(labels)
        if missing < 0:
            raise ConfigError(f"capacity {capacity} is less than this rank's {len(labels)} images")
        if missing:
            labels = nn.functional.pad(labels, (0, 0, 0, missing), value=NO_IMAGE)
        labels_GL = collectives.all_gather(labels.to(torch.int32), self.topology).long()
        counts_G = labels_GL[:, 0] != NO_IMAGE
        labels_GL = labels_for(self.spec.objective, labels_GL)
        rows_S = self.sampler.draw(labels_GL, step)
        position_c = torch.full((self.stop - self.start + 1,), len(rows_S), device=rows_S.device)
        position_c[rows_S] = torch.arange(len(rows_S), device=rows_S.device)
        here_GL = (labels_GL >= self.start) & (labels_GL < self.stop)
        columns_GL = position_c[torch.where(here_GL, labels_GL - self.start, self.stop - self.start)]
        return Draw(labels_GL, counts_G, rows_S, columns_GL, capacity)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | Draw,
        *,
        step: int | None = None,
        capacity: int | None = None,
        collect_stats: bool = False,
    ) -> HeadOutput:
        """Loss of the global batch.

        embeddings: [b, D] of this rank, any floating dtype, not normalised. labels: int64 [b, L], global classes, nearest
        first, NO_LABEL where there is none; rows that begin with NO_IMAGE take no part in anything. Or the `draw` made of
        them, which holds the other arguments. step: selects the negatives. capacity: the same number >= b on every rank
        (usually the micro-batch), or None to ask the others.
        Raises ConfigError when shapes do not fit. Labels >= K are the loader's to refuse: here they would need a host
        round trip in every step, and are ignored.
        """
        rows = labels.capacity if isinstance(labels, Draw) else len(labels)
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embed_dim or len(embeddings) > rows:
            raise ConfigError(
                f"embeddings {tuple(embeddings.shape)} do not fit {rows} label rows and D={self.embed_dim}"
            )
        if not isinstance(labels, Draw):
            if len(embeddings) != rows:
                raise ConfigError(f"{len(embeddings)} embeddings do not fit {rows} label rows")
            labels = self.draw(labels, step=step, capacity=capacity)
        draw = labels
        e_bD = _UnitEmbeddings.apply(embeddings, draw.capacity, self.centers.dtype)
        e_GD = collectives.gather_rows(e_bD, self.topology, self.gather_dtype)
        shift = self._needs_shift(draw.labels_GL.shape[1])
        fused = self.kernels == "triton" and not shift
        walk = _Walk(
            self.spec,
            self.topology,
            self.products,
            self._memory,
            self._chunk_rows(len(e_GD), draw.labels_GL.numel(), fused),
            shift,
            fused,
            learns=torch.is_grad_enabled(),
        )
        # Backward must run even where the embeddings come from a frozen encoder: the centers always learn.
        anchor = e_GD.new_zeros((), requires_grad=torch.is_grad_enabled())
        loss, stats = _ShardedLoss.apply(
            e_GD, anchor, self.centers.detach(), draw, walk, collect_stats, self._gradients
        )
        return HeadOutput(loss, self._name_stats(stats, draw) if collect_stats else {})

    def take_gradients(self) -> list[RowGradient]:
        """The gradients made since the last call, one item per backward, and forgets them."""
        gradients = list(self._gradients)
        self._gradients.clear()
        return gradients

    def recycle(self, gradient: RowGradient) -> None:
        """Takes back the memory of a gradient that has been applied; whoever still holds it will see it change."""
        self._memory.give("gradient", gradient.values_SD)

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

    def _chunk_rows(self, images: int, num_labels: int, fused: bool) -> int:
        """Images per chunk so that the logits stay within the workspace; from numbers that all ranks share."""
        bytes_per_logit = self.products.bytes_per_logit(self.centers, fused)
        row_bytes = (self.sampler.likely_rows(num_labels) + ALIGNMENT) * bytes_per_logit
        most = max(1, workspace_bytes(self.workspace_mb, row_bytes) // row_bytes)
        chunks = max(1, -(-images // most))
        return max(1, -(-images // chunks))

    def _name_stats(self, stats, draw: Draw) -> dict[str, torch.Tensor]:
        """One all-reduce makes the shards' statistics those of the whole head."""
        S, device = len(draw.rows_S), draw.rows_S.device
        is_positive = torch.zeros(S + 1, dtype=torch.bool, device=device).index_fill_(
            0, draw.columns_GL.flatten(), True
        )
        counts = torch.stack([torch.full((), S, device=device), is_positive[:S].sum()])
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


def workspace_bytes(workspace_mb: float | None, row_bytes: int) -> int:
    """Bytes of the workspace. row_bytes: of one image's logits."""
    if workspace_mb is None:
        return max(WORKSPACE_BYTES, min(MIN_CHUNK * row_bytes, MAX_WORKSPACE_BYTES))
    return int(workspace_mb * 2**20)


def random_rows(start: int, stop: int, num_classes: int, dim: int, seed: int) -> torch.Tensor:
    """Initial centers [stop-start, D] float32: a function of (seed, global row), so every world size starts alike."""
    rows = []
    for block in range(start // INIT_BLOCK, -(-stop // INIT_BLOCK)):
        first = block * INIT_BLOCK
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        values = torch.randn(min(INIT_BLOCK, num_classes - first), dim, generator=generator) * INIT_STD
        rows.append(values[max(start - first, 0) : stop - first])
    return torch.cat(rows)


class _Products:
    """The three matrix products, with factors in the dtype of the centers."""

    def factor(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as a factor of a product."""
        return tensor

    def bytes_per_logit(self, centers: torch.Tensor, fused: bool) -> int:
        """What one entry of the workspace takes, with the copy of it that the products need where that is made whole."""
        return centers.element_size()

    def put(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """out = a @ b, of factors."""
        torch.mm(a, b, out=out)

    def add(self, a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        """into += a @ b, of factors."""
        into.addmm_(a, b)


class _BFloat16Products(_Products):
    """Factors rounded to bfloat16, products accumulated and returned in float32.

    On a CPU the rounded factors are multiplied in float32: the same numbers, and faster than its bfloat16 products.
    """

    BLOCK = 1 << 24
    """Elements of a sum that are made at a time."""

    def factor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16()

    def bytes_per_logit(self, centers: torch.Tensor, fused: bool) -> int:
        return 2 if fused else centers.element_size() + 2

    def put(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if out.is_cuda:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def add(self, a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
        rows = max(1, self.BLOCK // into.shape[1])
        product = into.new_empty(min(rows, len(into)), into.shape[1])
        for first in range(0, len(into), rows):
            block = into[first : first + rows]
            self.put(a[first : first + rows], b, product[: len(block)])
            block += product[: len(block)]


class _Buffers:
    """Memory that every step needs.

    Kept on a CPU, where the system clears each page of a large array anew: three of these took a quarter of a small step.
    On a GPU torch's own cache does that, and lets the encoder have the memory in between.
    """

    def __init__(self, device: torch.device):
        self._kept: dict[str, torch.Tensor] | None = {} if device.type == "cpu" else None

    def take(self, name: str, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of that shape, for this step alone: the next call with this name may return it again."""
        tensor = self.hand_out(name, shape, like)
        self.give(name, tensor)
        return tensor

    def hand_out(self, name: str, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of that shape, which is the caller's until it `give`s it back."""
        if self._kept is None:
            return like.new_empty(shape)
        elements = math.prod(shape)
        flat = self._kept.pop(name, None)
        # Memory of inference mode may not be written outside of it, nor that of another dtype be taken for this one.
        fits = (
            flat is not None and flat.dtype == like.dtype and flat.is_inference() == torch.is_inference_mode_enabled()
        )
        if not fits or flat.numel() < elements:
            del flat  # the old one goes before the new one comes
            # A little more: the number of rows differs from step to step.
            flat = like.new_empty(elements + elements // 16)
        return flat[:elements].view(shape)

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps the memory of `tensor`, all of what it is a view of, for the next call with this name."""
        if self._kept is not None:
            whole = tensor if tensor._base is None else tensor._base
            self._kept[name] = whole.view(-1)


@dataclass(frozen=True)
class _Walk:
    """How a shard's matrix is walked over: what all chunks share.

    shift: see PartialFC._needs_shift. fused: by the kernels of kernels/epilogue.py. learns: whether gradients are wanted;
    without them, one product is enough.
    """

    spec: LossSpec
    topology: Topology
    products: _Products
    buffers: _Buffers
    chunk_rows: int
    shift: bool
    fused: bool
    learns: bool


class _UnitEmbeddings(torch.autograd.Function):
    """Embeddings at unit length, zero rows behind them up to `capacity`; backward works in the memory of its input."""

    @staticmethod
    def forward(ctx, embeddings_bD, capacity, dtype):
        b, D = embeddings_bD.shape
        embeddings_bD = embeddings_bD.to(dtype)
        norm_b = torch.linalg.vector_norm(embeddings_bD, dim=1).clamp_min_(NORM_FLOOR)
        e_CD = embeddings_bD.new_empty(capacity, D)
        torch.div(embeddings_bD, norm_b[:, None], out=e_CD[:b])
        e_CD[b:] = 0
        ctx.save_for_backward(e_CD, norm_b)
        return e_CD

    @staticmethod
    def backward(ctx, d_e_CD):
        e_CD, norm_b = ctx.saved_tensors
        b = len(norm_b)
        d_bD = d_e_CD[:b]  # nobody else has it: the reduce-scatter has just made it
        _project(d_bD, e_CD[:b], norm_b)
        return d_bD, None, None


class _ShardedLoss(torch.autograd.Function):
    """Loss and both gradients in one walk over row chunks; see the head of this file.

    e_GD: unit rows. anchor: a scalar whose gradient nobody reads. centers_cD: raw rows of the shard. gradients: the list
    to which backward appends the centers' RowGradient.
    """

    @staticmethod
    def forward(ctx, e_GD, anchor, centers_cD, draw, walk, collect_stats, gradients):
        w_TD, norm_S = _unit_rows(centers_cD, draw.rows_S, walk.buffers)
        factor_TD = walk.products.factor(w_TD)
        d_w_TD, d_e_GD = w_TD, e_GD  # nothing is written into them
        if walk.learns:
            d_w_TD, d_e_GD = walk.buffers.hand_out("gradient", tuple(w_TD.shape), w_TD), torch.empty_like(e_GD)
        weight_G = draw.counts_G.to(e_GD.dtype) / draw.counts_G.sum().clamp_min(1)
        like = factor_TD if walk.fused else e_GD
        workspace = walk.buffers.take("logits", (min(walk.chunk_rows, len(e_GD)), len(w_TD)), like).flatten()
        stats = _Statistics(e_GD, walk.spec) if collect_stats else None
        loss = e_GD.new_zeros(2)
        if len(e_GD) == 0 and walk.learns:
            d_w_TD.zero_()
        for first in range(0, len(e_GD), walk.chunk_rows):
            rows = slice(first, min(first + walk.chunk_rows, len(e_GD)))
            part = e_GD[rows], draw.columns_GL[rows], weight_G[rows], d_e_GD[rows]
            loss += _chunk(*part, w_TD, factor_TD, d_w_TD, first == 0, workspace, walk, len(draw.rows_S), stats)
        named = {"loss_positive": loss[0], "loss_negative": loss[1]}
        S = len(draw.rows_S)
        del workspace, factor_TD
        if stats is not None:
            named["summed"] = stats.finish(e_GD, w_TD[:S], draw.columns_GL, draw.counts_G)
        if not walk.learns:
            return loss.sum(), named
        d_w_SD = d_w_TD[:S]
        _project(d_w_SD, w_TD[:S], norm_S)
        ctx.made = d_e_GD, RowGradient(draw.rows_S, d_w_SD, is_whole=S == len(centers_cD))
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


def _unit_rows(centers_cD: torch.Tensor, rows_S: torch.Tensor, buffers: _Buffers) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampled rows at unit length [T, D], and their lengths [S].

    T: S and at least one more, aligned. The rows from S on are zero: "no positive here" points at row S, so that no index
    needs a host round trip to be filtered.
    """
    S, D = len(rows_S), centers_cD.shape[1]
    w_TD = buffers.take("centers", (_aligned(S + 1), D), centers_cD)
    w_TD[S:] = 0
    norm_S = centers_cD.new_empty(S)
    whole = S == len(centers_cD)
    for block in _row_blocks(w_TD[:S]):
        w_nD, norm_n = w_TD[block], norm_S[block]
        raw_nD = centers_cD[block] if whole else torch.index_select(centers_cD, 0, rows_S[block], out=w_nD)
        torch.linalg.vector_norm(raw_nD, dim=1, out=norm_n).clamp_min_(NORM_FLOOR)
        torch.div(raw_nD, norm_n[:, None], out=w_nD)
    return w_TD, norm_S


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _project(d_w_SD: torch.Tensor, w_SD: torch.Tensor, norm_S: torch.Tensor) -> None:
    """Through w = c / |c|, in place: the part of the gradient along w does not move the direction."""
    for block in _row_blocks(d_w_SD):
        d_nD, w_nD = d_w_SD[block], w_SD[block]
        along_n = torch.linalg.vecdot(w_nD, d_nD)
        d_nD.addcmul_(w_nD, along_n[:, None], value=-1).div_(norm_S[block, None])


def _chunk(
    e_nD, columns_nL, weight_n, d_e_nD, w_TD, factor_TD, d_w_TD, is_first: bool, workspace, walk: _Walk, S: int, stats
) -> torch.Tensor:
    """One row chunk: puts its gradient into d_e_nD, adds to d_w_TD, returns its [positive, negative] part of the loss."""
    spec, topology, products = walk.spec, walk.topology, walk.products
    n, T = len(e_nD), len(w_TD)
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
    # d loss / d cosine, the mean's weight included. A row that is no image has weight zero.
    negative_n = (two.log_negative_weight_G + own_2n[0]).exp() * (weight_n * spec.scale)
    positive_nL = (minus_s_nL + (two.log_positive_weight_G + own_2n[1])[:, None]).exp() * -(weight_n * spec.scale)[
        :, None
    ]
    if spec.margin_gradient == "exact":
        positive_nL = positive_nL * slope_nL
    d_e_nD.mul_(negative_n[:, None])
    make = products.put if is_first else products.add
    make(terms.factor_nT.T, products.factor(e_nD * negative_n[:, None]), d_w_TD)
    for columns_n, positive_n in zip(columns_nL.T, positive_nL.T, strict=True):
        d_e_nD.addcmul_(w_TD[columns_n], positive_n[:, None])
        d_w_TD.index_add_(0, columns_n, e_nD * positive_n[:, None])
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


def _exponentiate(e_nD, columns_nL, weight_n, w_TD, factor_TD, logits_nT, walk: _Walk, S: int, stats) -> _Terms:
    """In torch, in place in the workspace `logits_nT`."""
    spec, products = walk.spec, walk.products
    products.put(products.factor(e_nD * spec.scale), factor_TD.T, logits_nT)
    cosine_nL = logits_nT.gather(1, columns_nL) / spec.scale
    if stats is not None:
        stats.add(logits_nT[:, : S + 1], cosine_nL, columns_nL, weight_n)
    if spec.negative_filter is not None:
        logits_nT.masked_fill_(logits_nT > spec.scale * spec.negative_filter, -torch.inf)
    # The positives leave the negative sum before it is summed (exp(-inf) = 0), never by subtraction; so do the zero rows.
    logits_nT.scatter_(1, columns_nL, -torch.inf)
    logits_nT[:, S:] = -torch.inf
    maximum_n = None
    if walk.shift:
        maximum_n = logits_nT.amax(dim=1)
        logits_nT.sub_(maximum_n.masked_fill(maximum_n == -torch.inf, 0)[:, None])
    exp_nT = logits_nT.exp_()
    return _Terms(cosine_nL, products.factor(exp_nT), exp_nT.sum(dim=1), maximum_n)


def _exponentiate_fused(e_nD, columns_nL, weight_n, w_TD, factor_TD, out_nT, walk: _Walk, S: int, stats) -> _Terms:
    """By kernels.epilogue: the logits exist a tile of columns at a time, small enough for a GPU's cache."""
    from mlcd_ds.kernels.epilogue import exponentials

    spec, products = walk.spec, walk.products
    n, T = out_nT.shape
    scaled_nD = products.factor(e_nD * spec.scale)
    # Of the positives from unrounded factors: n L products instead of a gather from a matrix that is not there.
    cosine_nL = torch.stack([torch.linalg.vecdot(e_nD, w_TD[columns_n]) for columns_n in columns_nL.T], dim=1)
    if stats is not None:
        rows = slice(0, 0 if stats.seen else stats.ROWS)
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
    The negatives' histogram is that of the first chunk, up to 64 images of it: a picture, not a sum to reconcile.
    """

    ROWS = 64

    def __init__(self, e_GD: torch.Tensor, spec: LossSpec):
        self.spec = spec
        self.positive = e_GD.new_zeros(2)
        self.histogram_2H = e_GD.new_zeros(2, HISTOGRAM_BINS)
        self.seen = False

    def add(self, logits_nS1, cosine_nL, columns_nL, weight_n) -> None:
        """logits_nS1: of at least the first ROWS images, with one column more than there are rows."""
        here_nL = (columns_nL != logits_nS1.shape[1] - 1) & (weight_n > 0)[:, None]
        self.positive += torch.stack([torch.where(here_nL, cosine_nL, 0).sum(), here_nL.sum()])
        # Bin -1 catches what is not to be counted.
        self._count(0, torch.where(here_nL, cosine_nL, -2))
        if not self.seen:
            self.seen = True
            cosine = logits_nS1[: self.ROWS] / self.spec.scale
            cosine.scatter_(1, columns_nL[: self.ROWS], -2)
            cosine[:, -1] = -2
            self._count(1, cosine.masked_fill_((weight_n[: self.ROWS] == 0)[:, None], -2))

    def _count(self, which: int, cosine: torch.Tensor) -> None:
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
