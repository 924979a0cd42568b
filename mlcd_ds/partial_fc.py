"""This rank's shard of the class centers: which of its rows take part in a step, and what they cost and learn.

Shapes: b images of this rank, G = W*b images of all ranks, D embedding, K classes, c classes of this shard, S sampled
rows of this shard, L labels. How loss and gradients are made stands in sharded_loss.py.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from mlcd_ds import collectives
from mlcd_ds.batch import NO_IMAGE
from mlcd_ds.collectives import GatheringRows
from mlcd_ds.config import HeadConfig
from mlcd_ds.errors import ConfigError
from mlcd_ds.kernels import check_available
from mlcd_ds.losses import LossSpec, labels_for
from mlcd_ds.partition import ClassPartition
from mlcd_ds.products import BFloat16Products, Buffers, Products
from mlcd_ds.sampling import ClassSampler, Draw, Marked, positions
from mlcd_ds.sharded_loss import ALIGNMENT, HISTOGRAM_BINS, RowGradient, ShardedLoss, UnitEmbeddings, Walk, unit_rows
from mlcd_ds.topology import Topology

_DEFAULTS = HeadConfig()

INIT_BLOCK = 1024
"""Rows that one generator makes: part of what (seed, global row) means."""

WORKSPACE_BYTES = 128 << 20
"""Of logits that exist at one time, where `workspace_mb` leaves it open; more where they are less than MIN_CHUNK images."""

MIN_CHUNK = 512
"""Images a product needs at least to run at full speed."""

MAX_WORKSPACE_BYTES = 1_400_000_000
"""What a workspace of MIN_CHUNK images may grow to; with more rows than that holds, chunks have fewer images."""

INIT_STD = 0.01
"""Standard deviation of the elements of random initial centers, as in the published PartialFC."""


@dataclass(frozen=True)
class HeadOutput:
    """loss: scalar, the mean over the GLOBAL batch, the same on every rank. stats: tensors on the device, for monitoring."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


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
    Raises ConfigError for fewer classes than ranks or 2^31 of them, an unknown objective, or centers of another shape.
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
        if num_classes >= 1 << 31:
            raise ConfigError(f"{num_classes} classes: labels travel as int32, at most {(1 << 31) - 1} are possible")
        self.partition = ClassPartition(num_classes, self.topology.world_size)
        self.embed_dim = embed_dim
        self.spec = LossSpec(objective, scale, margin, margin_type, margin_gradient, negative_filter)
        self._check(sample_budget, precision, gather_precision, kernels, dtype)
        self.products = {"float32": Products, "bfloat16": BFloat16Products}[precision]()
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
        self._memory = Buffers(self.topology.device)

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

    def mark(self, labels: torch.Tensor, *, step: int, capacity: int | None = None) -> Marked:
        """Gathers the labels of a micro-step and marks the classes that take part; needs no embeddings.

        With `capacity` given, the host waits for nothing on a GPU: a step ahead, this runs behind the encoder's backward.
        Arguments as for `forward`.
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
        here_GL = (labels_GL >= self.start) & (labels_GL < self.stop)
        marked_c, rows = None, torch.full((), self.stop - self.start, device=labels_GL.device)
        if not self.sampler.takes_all:
            marked_c = self.sampler.mark(labels_GL, step)
            rows = marked_c.sum()
        return Marked(labels_GL, counts_G, here_GL, marked_c, torch.stack([rows, here_GL.sum()]), capacity)

    def draw(self, marked: Marked, sizes: tuple[int, int] | None = None) -> Draw:
        """The marked classes with their columns. sizes: `marked.sizes_2`; where it is None, the host waits for it."""
        num_rows, num_pairs = sizes or marked.sizes_2.tolist()
        c, device = self.stop - self.start, marked.labels_GL.device
        columns_GL = torch.where(marked.here_GL, marked.labels_GL - self.start, c)
        if marked.marked_c is None:
            rows_S = self._all_rows
        else:
            rows_S = positions(marked.marked_c, num_rows)
            column_c = torch.full((c + 1,), num_rows, device=device)
            column_c[rows_S] = torch.arange(num_rows, device=device)
            columns_GL = column_c[columns_GL]
        pairs_P = positions(marked.here_GL.flatten(), num_pairs)
        return Draw(marked.labels_GL, marked.counts_G, rows_S, columns_GL, pairs_P, marked.capacity)

    @cached_property
    def _all_rows(self) -> torch.Tensor:
        return torch.arange(self.stop - self.start, device=self.centers.device)

    def gather(self, embeddings: torch.Tensor, capacity: int) -> GatheringRows:
        """Starts gathering the embeddings [b, D] of all ranks, at unit length, with zero rows up to `capacity`.

        Several heads of the same dtypes on one encoder take what one of them has gathered.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embed_dim or len(embeddings) > capacity:
            raise ConfigError(
                f"embeddings {tuple(embeddings.shape)} do not fit {capacity} label rows and D={self.embed_dim}"
            )
        e_bD = UnitEmbeddings.apply(embeddings, capacity, self.centers.dtype)
        return collectives.start_gather_rows(e_bD, self.topology, self.gather_dtype)

    def forward(
        self,
        embeddings: torch.Tensor | GatheringRows,
        labels: torch.Tensor | Draw,
        *,
        step: int | None = None,
        capacity: int | None = None,
        collect_stats: bool = False,
    ) -> HeadOutput:
        """Loss of the global batch.

        embeddings: [b, D] of this rank, any floating dtype, not normalised; or what `gather` made of them. labels: int64
        [b, L], global classes, nearest first, NO_LABEL where there is none; rows that begin with NO_IMAGE take no part in
        anything (their embeddings must be finite all the same). Or the `draw` made of them, which holds the other
        arguments. step: selects the negatives. capacity: the same number >= b on every rank (usually the micro-batch), or
        None to ask the others.
        Raises ConfigError when shapes do not fit. Labels >= K are the loader's to refuse: here they would need a host
        round trip in every step, and are ignored.
        """
        draw = labels
        if not isinstance(draw, Draw):
            if not isinstance(embeddings, GatheringRows) and len(embeddings) != len(labels):
                raise ConfigError(f"{len(embeddings)} embeddings do not fit {len(labels)} label rows")
            draw = self.draw(self.mark(labels, step=step, capacity=capacity))
        gathering = embeddings if isinstance(embeddings, GatheringRows) else self.gather(embeddings, draw.capacity)
        if gathering.own_bD.shape != (draw.capacity, self.embed_dim) or gathering.own_bD.dtype != self.centers.dtype:
            raise ConfigError(
                f"gathered embeddings {tuple(gathering.own_bD.shape)} of {gathering.own_bD.dtype} do not fit "
                f"{draw.capacity} label rows, D={self.embed_dim} and centers of {self.centers.dtype}"
            )
        # Before the embeddings of the other ranks are here.
        rows = unit_rows(self.centers.detach(), draw.rows_S, self.products, self._memory)
        e_GD = gathering.wait()
        shift = self._needs_shift(draw.labels_GL.shape[1], len(e_GD))
        fused = self.kernels == "triton" and not shift
        walk = Walk(
            self.spec,
            self.topology,
            self.products,
            self._memory,
            self._chunk_rows(len(e_GD), draw.labels_GL.numel(), fused),
            shift,
            fused,
            learns=torch.is_grad_enabled(),
            shard_rows=len(self.centers),
            lift_bits=self._lift_bits(shift),
        )
        # Backward must run even where the embeddings come from a frozen encoder: the centers always learn.
        anchor = e_GD.new_zeros((), requires_grad=torch.is_grad_enabled())
        loss, stats = ShardedLoss.apply(e_GD, anchor, rows, draw, walk, collect_stats, self._gradients)
        return HeadOutput(loss, self._name_stats(stats, draw) if collect_stats else {})

    def take_gradients(self) -> list[RowGradient]:
        """The gradients made since the last call, one item per backward, and forgets them."""
        gradients = list(self._gradients)
        self._gradients.clear()
        return gradients

    def recycle(self, gradient: RowGradient) -> None:
        """Takes back the memory of a gradient that has been applied; whoever still holds it will see it change."""
        self._memory.give("gradient", gradient.values_SD)

    def _needs_shift(self, labels_per_image: int, images: int) -> bool:
        """Whether a sum of exponentials may leave the dtype's range, so that sums are kept relative to a maximum.

        The largest terms: K negatives of cosine 1, or all positives of an image at cosine -1, where a margin adds more; in
        mlc the latter are multiplied by the scale where there is no negative. The smallest number that matters, in mlc
        and cd, is an image's weight where all negatives are at cosine 1: as a factor in bfloat16, which has no bits left
        below its range, it must stay within it (mlcd's is lifted, see _lift_bits).
        """
        extra = {"arc": self.spec.margin * math.sin(self.spec.margin), "cos": self.spec.margin, "none": 0.0}
        scale, limit = self.spec.scale, math.log(torch.finfo(self.centers.dtype).max) - 1
        negatives = scale + math.log(self.partition.num_classes)
        positives = scale * (1 + extra[self.spec.margin_type]) + math.log(labels_per_image)
        if self.spec.objective != "mlcd":
            positives += max(0.0, math.log(scale))
            if isinstance(self.products, BFloat16Products):
                smallest = math.log(max(1, images)) + math.log(self.embed_dim) / 2 - math.log(scale)
                negatives = max(negatives, negatives + smallest + math.log(2**7))
        return max(negatives, positives) > limit

    def _lift_bits(self, shift: bool) -> int:
        """The centers' gradient is multiplied by 2 to this power while it is summed.

        In mlcd an image's weight 1 / (1 + N) lies between exp(-scale) / K and 1: times the root of its inverse least, it
        lies round 1, and neither it nor its product with an embedding leaves the range at the lower end.
        """
        if shift or self.spec.objective != "mlcd":
            return 0
        return round((self.spec.scale + math.log(self.partition.num_classes)) / 2 / math.log(2))

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
