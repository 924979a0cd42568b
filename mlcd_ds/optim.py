"""AdamW over the sampled rows of a sharded matrix, and norms of sharded gradients.

c rows of this shard, S rows that have a gradient, D columns.
"""

from collections.abc import Sequence

import torch

from mlcd_ds import collectives
from mlcd_ds.sampling import hash_
from mlcd_ds.sharded_loss import RowGradient
from mlcd_ds.topology import Topology

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Bytes of rows that are updated at a time: what stays in a CPU's cache, and on a GPU what bounds the temporaries."""


class GradientSum:
    """Sum of the micro-steps' gradients of one optimizer step, each row once.

    rows: what each micro-step draws (PartialFC.draw), known before the first gradient. union_S: the distinct ones of all,
    sorted; or None, where there is one micro-step, or all draw the same. `add` holds the sum and one gradient, never more.
    Raises ValueError for an empty list.
    """

    def __init__(self, rows: Sequence[torch.Tensor], union_S: torch.Tensor | None = None):
        if not rows:
            raise ValueError("a step has at least one micro-step")
        self.rows_S = rows[0] if union_S is None else union_S
        self._positions = [
            None if len(own) == len(self.rows_S) else torch.searchsorted(self.rows_S, own) for own in rows
        ]
        self._sum: RowGradient | None = None

    def add(self, micro_step: int, gradient: RowGradient) -> bool:
        """Adds that micro-step's gradient. True where it became the sum itself: its memory must then be left alone."""
        at = self._positions[micro_step]
        if self._sum is None and at is None:
            self._sum = gradient
            return True
        if self._sum is None:
            values = gradient.values_SD
            self._sum = RowGradient(self.rows_S, values.new_zeros(len(self.rows_S), values.shape[1]))
        if at is None:
            self._sum.values_SD.add_(gradient.values_SD)
        else:
            self._sum.values_SD.index_add_(0, at, gradient.values_SD)
        return False

    @property
    def gradient(self) -> RowGradient:
        """The sum. Raises ValueError before the first `add`."""
        if self._sum is None:
            raise ValueError("no gradient was added: call add after each backward")
        return self._sum


def sharded_norms(
    matrices: Sequence[torch.Tensor], topology: Topology, riders: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """([H], [n]): Euclidean norms of H matrices whose rows lie on all ranks, and `riders` summed over the ranks.

    riders: [n] numbers that go along, none by default. One all-reduce of H + n numbers.
    """
    squares_H = torch.stack([torch.linalg.vector_norm(values) for values in matrices]).square()
    riders = squares_H.new_empty(0) if riders is None else riders.to(squares_H)
    summed = collectives.sum_(torch.cat([squares_H, riders]), topology)
    return summed[: len(matrices)].sqrt(), summed[len(matrices) :]


class RowAdamW:
    """Decoupled AdamW (Loshchilov and Hutter, 2019, algorithm 2) that reads and writes sampled rows only.

    A row that was not sampled neither moves nor decays, and its moments wait; each row counts its own steps for the bias
    correction. With every row in every step this is torch.optim.AdamW. State per row: two rows of moments, and a count.
    The sampled rows are gathered, updated and scattered a block at a time: no temporary has the size of the shard.

    centers_cD: the parameter to change, in place. moments: dtype of both moments; None: that of the centers. bfloat16
    halves their memory; they are then rounded stochastically, so that small changes are not lost: the second moment moves by
    a thousandth of itself, which rounding to the nearest of bfloat16's 8 bits would drop. Up or down is decided by a hash of
    (seed, step, global row, column): the number of ranks does not enter. first_row: global row of the first center here.
    kernels: "torch", or "triton" for one pass over float32 rows and moments.
    """

    def __init__(
        self,
        centers_cD: torch.Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moments: torch.dtype | None = None,
        seed: int = 0,
        kernels: str = "torch",
        first_row: int = 0,
    ):
        self.centers_cD = centers_cD
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.seed = seed
        self.first_row = first_row
        self.fused = kernels == "triton" and centers_cD.dtype == torch.float32 and moments in (None, torch.float32)
        self.exp_avg_cD = torch.zeros_like(centers_cD, dtype=moments)
        self.exp_avg_sq_cD = torch.zeros_like(centers_cD, dtype=moments)
        self.steps_c = torch.zeros(len(centers_cD), dtype=torch.int32, device=centers_cD.device)

    @torch.no_grad()
    def step(self, gradient: RowGradient, learning_rate: float, step: int = 0) -> None:
        """One step of the rows in `gradient`, which must be distinct. step: of the run; it seeds stochastic rounding."""
        if self.fused:
            self._step_fused(gradient, learning_rate)
            return
        size = BLOCK_BYTES[self.centers_cD.device.type] // (self.centers_cD.shape[1] * self.centers_cD.element_size())
        size = max(1, size)
        for first in range(0, len(gradient.rows_S), size):
            block = slice(first, min(first + size, len(gradient.rows_S)))
            rows = slice(block.start, block.stop) if gradient.is_whole else gradient.rows_S[block]
            self._step_block(rows, gradient.values_SD[block], learning_rate, step)

    def _step_fused(self, gradient: RowGradient, learning_rate: float) -> None:
        from mlcd_ds.kernels.row_adamw import row_adamw

        rows_S = gradient.rows_S
        steps_S = self.steps_c[rows_S] + 1
        self.steps_c[rows_S] = steps_S
        beta1, beta2 = self.betas
        step_size_S = (learning_rate / (1 - beta1 ** steps_S.double())).float()
        root_S = (1 - beta2 ** steps_S.double()).sqrt().float()
        tensors = self.centers_cD, self.exp_avg_cD, self.exp_avg_sq_cD, rows_S, gradient.values_SD, step_size_S, root_S
        row_adamw(*tensors, beta1, beta2, self.eps, 1 - learning_rate * self.weight_decay)

    def _step_block(self, rows, g_nD: torch.Tensor, learning_rate: float, step: int) -> None:
        """rows: a slice (the update is then in place) or int64 [n]."""
        beta1, beta2 = self.betas
        dtype = self.centers_cD.dtype
        centers_nD = self.centers_cD[rows]
        m_nD = self.exp_avg_cD[rows].to(dtype).lerp_(g_nD, 1 - beta1)
        v_nD = self.exp_avg_sq_cD[rows].to(dtype).mul_(beta2).addcmul_(g_nD, g_nD, value=1 - beta2)
        steps_n = self.steps_c[rows] + 1
        # Powers in float64: 1 - 0.999^t loses digits in float32 while t is small.
        count_n1 = steps_n.double()[:, None]
        step_size_n1 = (learning_rate / (1 - beta1**count_n1)).to(dtype)
        root_n1 = (1 - beta2**count_n1).sqrt().to(dtype)
        change_nD = v_nD.sqrt().div_(root_n1).add_(self.eps).reciprocal_().mul_(m_nD).mul_(step_size_n1)
        centers_nD.mul_(1 - learning_rate * self.weight_decay).sub_(change_nD)
        self.steps_c[rows] = steps_n
        if self.exp_avg_cD.dtype != dtype:
            noise_nD = self._noise(rows, step)
            m_nD = round_stochastically(m_nD, noise_nD & 0xFFFF)
            v_nD = round_stochastically(v_nD, noise_nD.bitwise_right_shift_(16).bitwise_and_(0xFFFF))
        self.exp_avg_cD[rows] = m_nD
        self.exp_avg_sq_cD[rows] = v_nD
        self.centers_cD[rows] = centers_nD

    def _noise(self, rows, step: int) -> torch.Tensor:
        """32 random bits for each element of these rows, int32 [n, D]: hashes of a hash of the row plus the column."""
        device = self.centers_cD.device
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
        rows_n = hash_(rows.to(torch.int32) + self.first_row, self.seed, step)
        columns_D = torch.arange(self.centers_cD.shape[1], dtype=torch.int32, device=device)
        return hash_(rows_n[:, None] + columns_D, self.seed, ~step)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moments and step counts of this shard's rows, by name."""
        return {"exp_avg": self.exp_avg_cD, "exp_avg_sq": self.exp_avg_sq_cD, "steps": self.steps_c}


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up or down with probabilities that make the expectation exact; finite values stay finite.

    noise: int32 of the same shape, uniform in 0..65535; overwritten.
    """
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    largest = torch.finfo(torch.bfloat16).max
    # What is infinite or NaN stays it; the last few numbers below infinity are rounded down.
    return torch.where(values.isfinite(), bits.view(torch.float32).clamp(-largest, largest), values).bfloat16()
