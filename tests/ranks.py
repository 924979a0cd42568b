"""Several ranks in one process: a thread and a gloo process group each, over loopback. For tests of mathematics."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

from mlcd_ds.topology import Topology


def _gloo_group(store, rank: int, world_size: int, timeout_seconds: float) -> dist.ProcessGroup:
    group = dist.ProcessGroup(store, rank, world_size)
    timeout = timedelta(seconds=timeout_seconds)
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("ranks", store), rank, world_size, timeout)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._set_group_name(f"ranks_{id(store)}_{rank}")
    return group


def run_ranks(world_size: int, function: Callable[[Topology], object], timeout_seconds: float = 60) -> list:
    """`function(topology)` on every rank at once; the results in rank order. A rank's exception is raised here.

    Each group is made directly, not registered with torch.distributed, so eight ranks cost milliseconds, not seconds.
    """
    if world_size == 1:
        return [function(Topology.single())]
    store = dist.HashStore()

    def one(rank: int):
        torch.set_num_threads(1)
        group = _gloo_group(store, rank, world_size, timeout_seconds)
        return function(Topology(rank, world_size, rank, world_size, torch.device("cpu"), group))

    with ThreadPoolExecutor(world_size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(world_size)]]
