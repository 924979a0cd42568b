"""What follows the first product of a chunk, in one pass: mask, exponential, rounding, row sums.

In torch these are five passes over the logits; here a tile of logits is read once and its exponentials are written once,
in the dtype of the next product's factor. With TRITON_INTERPRET=1 the kernel runs on a CPU, for tests.

Shapes: n images of a chunk, t columns of a tile of logits, T columns of the chunk, S sampled rows, L labels an image.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 16, 256
"""A program's part of the tile."""


@triton.jit
def _exponentials(
    logits,
    out,
    columns,
    sums,
    n,
    width,
    first,
    S,
    largest,
    logits_stride,
    out_stride,
    sums_stride,
    L: tl.constexpr,
    HAS_FILTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < n, within < width
    inside = is_row[:, None] & is_column[None, :]
    # int64: a chunk's workspace may have more than 2^31 elements.
    logit = tl.load(logits + row.to(tl.int64)[:, None] * logits_stride + within[None, :], mask=inside, other=0.0)
    column = first + within
    counts = inside & (column < S)[None, :]
    for label in range(L):
        positive = tl.load(columns + row.to(tl.int64) * L + label, mask=is_row, other=-1)
        counts = counts & (column[None, :] != positive[:, None])
    if HAS_FILTER:
        counts = counts & (logit <= largest)
    value = tl.where(counts, tl.exp(logit), 0.0)
    tl.store(
        out + row.to(tl.int64)[:, None] * out_stride + column[None, :], value.to(out.dtype.element_ty), mask=inside
    )
    tl.store(sums + row * sums_stride + tl.program_id(1), tl.sum(value, axis=1), mask=is_row)


def exponentials(
    logits_nt: torch.Tensor,
    out_nT: torch.Tensor,
    columns_nL: torch.Tensor,
    first: int,
    num_columns: int,
    largest: float | None,
) -> torch.Tensor:
    """Writes exp(logits) of the negatives into columns first..first+t of out_nT, zeros elsewhere; returns their row sums.

    logits_nt: float32 [n, t]. out_nT: float32 or bfloat16. columns_nL: int64, each image's positives' columns (S: none
    here). num_columns: S; columns from S on count for nothing. largest: logits above it are left out; None: none are.
    Returns float32 [n], summed before rounding.
    """
    n, t = logits_nt.shape
    grid = (triton.cdiv(n, ROWS), triton.cdiv(t, COLUMNS))
    # One sum per program, added up by torch: atomics would add in any order.
    sums_np = logits_nt.new_empty(n, grid[1])
    _exponentials[grid](
        logits_nt,
        out_nT,
        columns_nL.contiguous(),
        sums_np,
        n,
        t,
        first,
        num_columns,
        0.0 if largest is None else largest,
        logits_nt.stride(0),
        out_nT.stride(0),
        sums_np.stride(0),
        L=columns_nL.shape[1],
        HAS_FILTER=largest is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return sums_np.sum(dim=1)
