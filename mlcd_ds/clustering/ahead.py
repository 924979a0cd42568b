"""The next block made ready while the caller works on this one: reading and preparing features hides behind the search."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")


def ahead(make: Callable[..., Made], items: Iterable[tuple]) -> Iterator[Made]:
    """`make(*item)` of each item in their order, the next one by a thread while the caller has this one.

    Two are in memory at a time. What makes the third may overwrite the first: the caller has come back for the second. What
    `make` raises is raised here, in its turn. Closing the generator (a loop that is left does) waits for the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        ready: Future | None = None
        for item in items:
            coming = pool.submit(make, *item)
            if ready is not None:
                yield ready.result()
            ready = coming
        if ready is not None:
            yield ready.result()
