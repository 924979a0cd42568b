"""The next block made ready while a GPU works on this one: reading and preparing features hides behind the search."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def ahead(make: Callable[..., Made], items: Iterable[tuple], device: torch.device) -> Iterator[Made]:
    """`make(*item)` of each item in their order; with a GPU the next one by a thread while the caller has this one.

    With CPUs, whose cores the caller's search wants itself, each when it is asked for: a thread took 1.01 to 1.13 times the
    time there (docs/DEVLOG.md).
    Two are in memory at a time. What makes the third may overwrite the first: the caller has come back for the second. What
    `make` raises is raised here, in its turn. Closing the generator (a loop that is left does) waits for the thread.
    """
    if device.type == "cpu":
        yield from itertools.starmap(make, items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        ready: Future | None = None
        for item in items:
            coming = pool.submit(make, *item)
            if ready is not None:
                yield ready.result()
            ready = coming
        if ready is not None:
            yield ready.result()
