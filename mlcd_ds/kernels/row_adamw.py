"""AdamW of sampled rows in one pass: each row is read once and written once, without a gathered copy.

The arithmetic is that of optim.RowAdamW, which calls this for float32 moments. With TRITON_INTERPRET=1 it runs on a CPU,
for tests. Shapes: c rows of the shard, S rows with a gradient, D columns.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_adamw(
    centers,
    exp_avg,
    exp_avg_sq,
    rows,
    gradients,
    step_size,
    root,
    beta1,
    beta2,
    eps,
    keep,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    inside = offset < D
    where = tl.load(rows + at).to(tl.int64) * D + offset
    g = tl.load(gradients + at.to(tl.int64) * D + offset, mask=inside, other=0.0)
    m = tl.load(exp_avg + where, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + where, mask=inside, other=0.0)
    w = tl.load(centers + where, mask=inside, other=0.0)
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    w = w * keep - tl.load(step_size + at) * m / (tl.sqrt(v) / tl.load(root + at) + eps)
    tl.store(exp_avg + where, m, mask=inside)
    tl.store(exp_avg_sq + where, v, mask=inside)
    tl.store(centers + where, w, mask=inside)


def row_adamw(
    centers_cD: torch.Tensor,
    exp_avg_cD: torch.Tensor,
    exp_avg_sq_cD: torch.Tensor,
    rows_S: torch.Tensor,
    gradients_SD: torch.Tensor,
    step_size_S: torch.Tensor,
    root_S: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    keep: float,
) -> None:
    """Moves rows_S (distinct) of centers and moments in place. All float32 and contiguous.

    step_size_S, root_S: learning rate / (1 - beta1^t) and sqrt(1 - beta2^t) of each row. keep: 1 - learning rate * decay.
    """
    D = centers_cD.shape[1]
    if len(rows_S):
        _row_adamw[(len(rows_S),)](
            centers_cD,
            exp_avg_cD,
            exp_avg_sq_cD,
            rows_S,
            gradients_SD,
            step_size_S,
            root_S,
            beta1,
            beta2,
            eps,
            keep,
            D=D,
            BLOCK=triton.next_power_of_2(D),
        )
