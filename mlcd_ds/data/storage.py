"""Reading from disks and file servers that fail: what is tried again, what is the machine's fault and its cure."""

import errno
import os
import re
import resource
import socket
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

LOST_CONNECTIONS = frozenset(
    "ServerDisconnectedError ClientConnectionError ClientPayloadError ServerTimeoutError IncompleteRead RemoteDisconnected "
    "IncompleteReadError EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError "
    "ResponseStreamingError ProtocolError ChunkedEncodingError Timeout SSLEOFError".split()
)
"""Names of what aiohttp, http.client, asyncio, botocore, urllib3, requests and ssl raise for a connection that broke."""
CURL_LOST = frozenset((5, 6, 7, 18, 28, 35, 52, 55, 56, 92))
"""Exit codes of curl for a server that was not found, not reached, or broke off."""

T = TypeVar("T")


class UnreadableError(DataError):
    """A file cannot be read, for a reason that lies in the machine and not in the file: no skip, the run ends."""


def persistently(read: Callable[[], T], name: str, waits: Sequence[float] = RETRY_SECONDS) -> T:
    """`read()` of the file `name` ("the tar x.tar"); where a disk or a file server fails, again after each of `waits` (s).

    Raises UnreadableError, with the cure, for what lies in the machine: no more open files, no memory, no permission, a file
    server that is still away after the last try. Any other OSError is raised as it is, a disk's (EIO) after the last try.
    """

    def may_pass(error: Exception) -> bool:
        return isinstance(error, OSError) and error.errno in (*SERVER_ERRORS, errno.EIO)

    try:
        return retried(read, may_pass, waits)
    except OSError as error:
        cure = cure_of(error.errno)
        if cure is None:
            raise
        raise UnreadableError(f"cannot read {name}: {error.strerror}. {cure}") from None


def retried(attempt: Callable[[], T], may_pass: Callable[[Exception], bool], waits: Sequence[float]) -> T:
    """`attempt()`, again after each of `waits` (s) while it raises what `may_pass`; the last error as it is."""
    for wait in waits:
        try:
            return attempt()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(wait)
    return attempt()


def is_away(error: BaseException) -> bool:
    """Whether a fetch failed because the connection or the server did, which may be otherwise a moment later.

    Tells from what the libraries raise, and from what that was raised from: an HTTP status (408, 429 and 5xx but 501 and
    505 are a server's trouble, any other is its answer), else the number or the class of an error of the network, or curl's
    exit code.
    """
    chain = _chain(error)
    statuses = [status for link in chain if (status := _http_status(link)) is not None]
    if statuses:
        return statuses[0] in (408, 429) or (statuses[0] >= 500 and statuses[0] not in (501, 505))
    return any(_lost_connection(link) for link in chain)


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and what it was raised from, from the outermost on."""
    found: list[BaseException] = []
    waiting: list = [error]
    while waiting:
        link = waiting.pop(0)
        if isinstance(link, BaseException) and link not in found:
            found.append(link)
            waiting += [
                link.__cause__,
                link.__context__,
                getattr(link, "reason", None),
            ]  # urllib's URLError has a reason
    return found


def _http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, urllib, requests, botocore or gcsfs holds."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(answer, "status_code", None)
    for value in (found, getattr(error, "status", None), getattr(error, "code", None)):
        text = str(value)
        if value is not None and text.isdigit() and 400 <= int(text) < 600:
            return int(text)
    return None


def _lost_connection(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)) or getattr(error, "errno", None) in SERVER_ERRORS:
        return True
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    names = {parent.__name__ for parent in type(error).__mro__}
    curl = re.search(r"'curl'.*exit (\d+) \(read\)", str(error))  # WebDataset's words
    return bool(names & LOST_CONNECTIONS) or (curl is not None and int(curl.group(1)) in CURL_LOST)


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
