"""AdamW over the sampled rows of a sharded matrix, and norms of sharded gradients.

c rows of this shard, S rows that have a gradient, D columns.
"""

from collections.abc import Sequence

import torch

from mlcd_ds import collectives
from mlcd_ds.partial_fc import RowGradient
from mlcd_ds.topology import Topology


def merge_gradients(gradients: Sequence[RowGradient]) -> RowGradient:
    """Sum of several micro-steps' gradients, each row once. Raises ValueError for an empty list.

    Merged after each micro-step, no more than two gradients and their sum are ever alive. May reuse the first one's memory.
    """
    if not gradients:
        raise ValueError("no gradients to merge: call after backward")
    if len(gradients) == 1:
        return gradients[0]
    if all(g.is_whole for g in gradients):
        for other in gradients[1:]:
            gradients[0].values_SD.add_(other.values_SD)
        return gradients[0]
    rows, position = torch.cat([g.rows_S for g in gradients]).unique(return_inverse=True)
    values = torch.cat([g.values_SD for g in gradients])
    merged = values.new_zeros(len(rows), values.shape[1])
    return RowGradient(rows, merged.index_add_(0, position, values))


def sharded_norm(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Euclidean norm, a scalar tensor, of a matrix whose rows lie on all ranks. One all-reduce of one number."""
    return collectives.sum_(values.square().sum(), topology).sqrt()


class RowAdamW:
    """Decoupled AdamW (Loshchilov and Hutter, 2019, algorithm 2) that reads and writes sampled rows only.

    A row that was not sampled neither moves nor decays, and its moments wait; each row counts its own steps for the bias
    correction. With every row in every step this is torch.optim.AdamW. State per row: two rows of moments in the dtype
    of the centers, and a count.

    centers_cD: the parameter to change, in place.
    """

    def __init__(self, centers_cD: torch.Tensor, betas: tuple[float, float], eps: float, weight_decay: float):
        self.centers_cD = centers_cD
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.exp_avg_cD = torch.zeros_like(centers_cD)
        self.exp_avg_sq_cD = torch.zeros_like(centers_cD)
        self.steps_c = torch.zeros(len(centers_cD), dtype=torch.int32, device=centers_cD.device)

    @torch.no_grad()
    def step(self, gradient: RowGradient, learning_rate: float) -> None:
        """One step of the rows in `gradient`, which must be distinct."""
        rows_S, g_SD = gradient.rows_S, gradient.values_SD
        beta1, beta2 = self.betas
        centers_SD = self.centers_cD[rows_S]
        m_SD = self.exp_avg_cD[rows_S].lerp_(g_SD, 1 - beta1)
        v_SD = self.exp_avg_sq_cD[rows_S].mul_(beta2).addcmul_(g_SD, g_SD, value=1 - beta2)
        steps_S = self.steps_c[rows_S] + 1
        # Powers in float64: 1 - 0.999^t loses digits in float32 while t is small.
        count_S1 = steps_S.double()[:, None]
        step_size_S1 = (learning_rate / (1 - beta1**count_S1)).to(m_SD.dtype)
        root_S1 = (1 - beta2**count_S1).sqrt().to(m_SD.dtype)
        centers_SD.mul_(1 - learning_rate * self.weight_decay)
        centers_SD.sub_(step_size_S1 * m_SD / (v_SD.sqrt() / root_S1 + self.eps))
        self.exp_avg_cD[rows_S] = m_SD
        self.exp_avg_sq_cD[rows_S] = v_SD
        self.steps_c[rows_S] = steps_S
        self.centers_cD[rows_S] = centers_SD

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moments and step counts of this shard's rows, by name."""
        return {"exp_avg": self.exp_avg_cD, "exp_avg_sq": self.exp_avg_sq_cD, "steps": self.steps_c}
