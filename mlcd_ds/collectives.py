"""Collectives over a `Topology`, free at world size 1, and the autograd pair that the head is built on.

b rows of this rank, W ranks, G = W*b rows of all ranks in rank order, D columns.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from mlcd_ds.errors import Preempted, UserError
from mlcd_ds.topology import Topology

T = TypeVar("T")

# torch 2.13 renamed these two and warns about the old names; 2.11 knows only the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(rows_bD: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Rows of every rank, in rank order: [b, ...] -> [G, ...]. One all-gather; every rank must pass the same shape."""
    if not topology.is_distributed:
        return rows_bD
    gathered = rows_bD.new_empty((topology.world_size * rows_bD.shape[0], *rows_bD.shape[1:]))
    _all_gather_single(gathered, rows_bD.contiguous(), group=topology.group)
    return gathered


def reduce_scatter(rows_GD: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sum over ranks of [G, ...], of which this rank keeps its own [b, ...]. One reduce-scatter."""
    if not topology.is_distributed:
        return rows_GD
    own = rows_GD.new_empty((rows_GD.shape[0] // topology.world_size, *rows_GD.shape[1:]))
    _reduce_scatter_single(own, rows_GD.contiguous(), op=dist.ReduceOp.SUM, group=topology.group)
    return own


class _Done:
    """Stands for the handle of a collective that had nothing to do."""

    def wait(self) -> None:
        pass


def start_sum(tensor: torch.Tensor, topology: Topology):
    """Starts summing `tensor` over the ranks in place; the returned handle's `wait()` ends it. One all-reduce."""
    if not topology.is_distributed:
        return _Done()
    return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=topology.group, async_op=True)


def sum_(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sums `tensor` over the ranks in place and returns it. One all-reduce."""
    if topology.is_distributed:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=topology.group)
    return tensor


def max_(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Largest value over the ranks, in place. One all-reduce."""
    if topology.is_distributed:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=topology.group)
    return tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_bD, gathering, topology):
        ctx.topology = topology
        gathered_GD = gathering.finish()
        return gathered_GD.view_as(gathered_GD) if gathered_GD.dtype == rows_bD.dtype else gathered_GD.to(rows_bD.dtype)

    @staticmethod
    def backward(ctx, grad_GD):
        # Why the factor W. Let L be the mean loss over the global batch, which the head returns on every rank. The
        # encoder's exact gradient is sum_r J_r^T g_r: g_r the gradient of L with respect to rank r's embeddings, J_r the
        # Jacobian of rank r's encoder pass. The reduce-scatter hands each rank its g_r, summed over the shards. Each
        # rank's backward then makes J_r^T g_r, and the engine, taking every rank's loss for a local mean, AVERAGES
        # these over the W ranks: (1/W) sum_r J_r^T g_r. Multiplying g_r by W undoes exactly that division.
        grad_bD = reduce_scatter(grad_GD, ctx.topology)
        return (grad_bD * ctx.topology.world_size if ctx.topology.is_distributed else grad_bD), None, None


class _Transfer:
    """An all-gather that has been started. The host waits in `finish`, or, on a GPU, only its stream does."""

    def __init__(self, sent_bD: torch.Tensor, topology: Topology):
        self._gathered, self._handle = sent_bD, _Done()
        if topology.is_distributed:
            self._sent = sent_bD.contiguous()  # must live until it has been sent
            self._gathered = sent_bD.new_empty(topology.world_size * len(sent_bD), *sent_bD.shape[1:])
            self._handle = _all_gather_single(self._gathered, self._sent, group=topology.group, async_op=True)

    def finish(self) -> torch.Tensor:
        self._handle.wait()
        return self._gathered


class GatheringRows:
    """Rows on their way from every rank to every rank, see `start_gather_rows`."""

    def __init__(self, rows_bD: torch.Tensor, topology: Topology, dtype: torch.dtype):
        self.own_bD = rows_bD
        self._topology = topology
        self._transfer = _Transfer(rows_bD.detach().to(dtype), topology)
        self._gathered_GD: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """The rows of every rank [G, D], in rank order; the same tensor at every call, so that there is one way back."""
        if self._gathered_GD is None:
            self._gathered_GD = _GatherRows.apply(self.own_bD, self._transfer, self._topology)
        return self._gathered_GD


def start_gather_rows(rows_bD: torch.Tensor, topology: Topology, dtype: torch.dtype | None = None) -> GatheringRows:
    """Starts a differentiable all-gather for a loss that every rank computes as the mean over the GLOBAL batch.

    Forward: one all-gather, [b, D] -> [G, D], under way until `wait()`. Backward: one reduce-scatter (sum), times W,
    because the data-parallel engine will average gradients over the ranks (the derivation stands in the code). At world
    size 1 both are free. dtype: what the rows are rounded to on their way, at every world size; None: their own. The
    gradient is not rounded.
    """
    return GatheringRows(rows_bD, topology, dtype or rows_bD.dtype)


def gather_rows(rows_bD: torch.Tensor, topology: Topology, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`start_gather_rows`, waited for."""
    return start_gather_rows(rows_bD, topology, dtype).wait()


def gather_objects(item: T, topology: Topology) -> list[T]:
    """Every rank's `item`, in rank order, on every rank. For start-up and saving, not for the step."""
    if not topology.is_distributed:
        return [item]
    items: list = [None] * topology.world_size
    dist.all_gather_object(items, item, group=topology.group)
    return items


def barrier(topology: Topology) -> None:
    """Waits until every rank is here."""
    if topology.is_distributed:
        dist.barrier(group=topology.group)


def on_main(topology: Topology, function: Callable[..., T], *arguments) -> T:
    """`function(*arguments)` on rank 0 alone: its result, or the error it raises, on every rank.

    A UserError arrives as it is, and so does a wish to stop; what else goes wrong, as a RuntimeError on the others, so that
    they do not wait in vain.
    """
    result, error = None, None
    if topology.is_main:
        try:
            result = function(*arguments)
        except (UserError, Preempted) as raised:
            error = raised
        except Exception as raised:
            gather_objects((None, RuntimeError(f"rank 0: {type(raised).__name__}: {raised}")), topology)
            raise
    result, error = gather_objects((result, error), topology)[0]
    if error is not None:
        raise error
    return result


def on_main_for_long(topology: Topology, function: Callable[..., T], *arguments) -> T:
    """`on_main` for minutes of work, however short the ranks' timeout: meanwhile they exchange a word every second.

    The work is done in a thread. Its result, or the error it raises, on every rank; as with `on_main`, what is no UserError
    arrives as a RuntimeError on the others.
    """
    outcome: list[tuple[T | None, Exception | None]] = []

    def work() -> None:
        try:
            outcome.append((function(*arguments), None))
        except Exception as raised:
            outcome.append((None, raised))

    thread = threading.Thread(target=work, daemon=True)
    if topology.is_main:
        thread.start()
    told = None
    while told is None:
        if topology.is_main:
            thread.join(1.0)
            if outcome:
                result, error = outcome[0]
                plain = error is None or isinstance(error, UserError)
                told = result, error if plain else RuntimeError(f"rank 0: {type(error).__name__}: {error}")
        told = gather_objects(told, topology)[0]
    if topology.is_main and outcome[0][1] is not None:
        raise outcome[0][1]
    result, error = told
    if error is not None:
        raise error
    return result


def all_for_long(topology: Topology, function: Callable[..., T], *arguments) -> list[T]:
    """`function(*arguments)` on every rank: all results, in rank order, on every rank, however long each one takes.

    The work, which must not communicate, is done in a thread; meanwhile the ranks exchange a word every second. The first
    error of any rank is raised on all at once: a UserError as it is, another as a RuntimeError on the other ranks.
    """
    if not topology.is_distributed:
        return [function(*arguments)]
    outcome: list[tuple[T | None, Exception | None]] = []

    def work() -> None:
        try:
            outcome.append((function(*arguments), None))
        except Exception as raised:
            outcome.append((None, raised))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while True:
        thread.join(1.0)
        told = None
        if outcome:
            result, error = outcome[0]
            plain = error is None or isinstance(error, UserError)
            said = RuntimeError(f"rank {topology.rank}: {type(error).__name__}: {error}")
            told = result, error if plain else said
        everyone = gather_objects(told, topology)
        for _, error in filter(None, everyone):
            if error is not None:
                raise outcome[0][1] if outcome and outcome[0][1] is not None else error
        if all(everyone):
            return [result for result, _ in everyone]
