"""Reading from disks and file servers that fail: what is tried again, what is the machine's fault and its cure."""

import errno
import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from mlcd_ds.errors import DataError

RETRY_SECONDS = (0.1, 0.5, 2.0, 5.0)
"""Waits between the tries of a read that a disk or a file server refuses."""
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SERVER_ERRORS = (
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO,
)  # fmt: skip

T = TypeVar("T")


class UnreadableError(DataError):
    """A file cannot be read, for a reason that lies in the machine and not in the file: no skip, the run ends."""


def persistently(read: Callable[[], T], name: str, waits: Sequence[float] = RETRY_SECONDS) -> T:
    """`read()` of the file `name` ("the tar x.tar"); where a disk or a file server fails, again after each of `waits` (s).

    Raises UnreadableError, with the cure, for what lies in the machine: no more open files, no memory, no permission, a file
    server that is still away after the last try. Any other OSError is raised as it is, a disk's (EIO) after the last try.
    """
    for wait in (*waits, None):
        try:
            return read()
        except OSError as error:
            cure = cure_of(error.errno)
            if cure is not None and (error.errno not in SERVER_ERRORS or wait is None):
                raise UnreadableError(f"cannot read {name}: {error.strerror}. {cure}") from None
            if wait is None or (cure is None and error.errno != errno.EIO):
                raise
        time.sleep(wait)
    raise AssertionError("not reached")


def cure_of(number: int | None) -> str | None:
    """What to do about an error that lies in the machine; None for any other."""
    if number == errno.EMFILE:
        return too_many_files()
    if number == errno.ENFILE:
        return "This host may open no more files (sysctl fs.file-max): raise that, or end what else runs here."
    if number == errno.ENOMEM:
        return "This host has no memory left: use fewer --workers or less --prefetch."
    if number in (errno.EACCES, errno.EPERM):
        return f"User {os.getuid()} may not read it: change its permissions, or start as its owner."
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "What is fetched cannot be written: make room in --shard_cache, or choose another folder."
    if number in SERVER_ERRORS:
        return "Its file server does not answer: see that the file system is mounted here and its server is up."
    return None


def too_many_files() -> str:
    """What to do about EMFILE."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"This process may have {soft} files open at a time (ulimit -n). Raise the limit (ulimit -n {max(4096, 2 * soft)}, "
        "LimitNOFILE= of a service, --ulimit nofile= of a container), or use fewer --workers or less --prefetch."
    )
