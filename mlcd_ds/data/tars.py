"""Image tars in img2dataset's and WebDataset's layout: which exist, what is inside, reading and writing.

A sample is all members `KEY.EXT` with one KEY: the basename up to its first dot (WebDataset's rule; the folder part of
a member's name does not belong to the key). A sample counts as an image when one of its extensions is in
IMAGE_EXTENSIONS. Tars are indexed by walking their headers, so a cut or damaged tar is an error with path and byte,
where the usual readers end early without a word.
"""

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlcd_ds.data.storage import (
    MACHINE_ERRORS,
    RETRY_SECONDS,
    SERVER_ERRORS,
    T,
    UnreadableError,
    cure_of,
    is_away,
    persistently,
    retried,
)
from mlcd_ds.errors import DataError
from mlcd_ds.files import write_bytes, write_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions (any case) that make a sample an image; the first of them that a sample has is its image."""

PIPE = "pipe:"
"""Begins a shell command whose output is a tar."""

BLOCK = 512
WINDOW = 4096
"""Bytes that a walk reads at a time: texts, and the header behind them, come with the header before."""
LARGE_WINDOW = 1 << 16
"""The same, while one such window holds several headers."""
READ_AHEAD = 1 << 17
"""Bytes that are read at a time where most of them are wanted, in ascending order, and several samples fit."""
_ZERO_BLOCK = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_LINKS_AND_SPECIAL = (b"1", b"2", b"3", b"4", b"5", b"6")
_CURE = "Fetch or write it again, or take it out of the shard list."

# ---------------------------------------------------------------------------------------------- which shards


def expand_shards(spec: str, allow_pipe: bool = False, allow_missing: bool = False) -> list[str]:
    """Paths and URLs that `spec` names: braces, globs, text files with one path a line; '::' joins several.

    Order: as written for braces and lists, sorted for globs. In a list file, blank lines and lines that begin with '#'
    do not count; a path that does not exist as given is looked for beside the list file. allow_pipe: 'pipe:COMMAND' may
    name a tar. allow_missing: local files need not be there.
    Raises DataError when nothing matches, a local file is missing, or a shard (or shard name) comes twice.
    """
    parts = [part.strip() for part in spec.split("::") if part.strip()]
    shards = [shard for part in parts for shard in _expand_part(part, spec, allow_pipe)]
    if not shards:
        raise DataError(f"no tars match {spec!r}: the shard list is empty")
    missing = [shard for shard in shards if not is_url(shard) and not Path(shard).is_file()]
    if missing and not allow_missing:
        raise DataError(
            f"{len(missing)} of the {len(shards)} tars in {_short(spec)} do not exist, e.g. {', '.join(missing[:3])}. "
            "Correct the list, or fetch what is missing (training goes on without them by --allow_missing_shards)."
        )
    seen: dict[str, str] = {}
    for shard in shards:
        name = shard_name(shard)
        if name in seen:
            raise DataError(
                f"two shards of {_short(spec)} are named {name!r}: {seen[name]} and {shard}. Features and labels are "
                "found by that name: list every shard once, and rename tars of different folders that share a name."
            )
        seen[name] = shard
    return shards


def _expand_part(part: str, spec: str, allow_pipe: bool) -> list[str]:
    import braceexpand

    if part.startswith(PIPE):
        _refuse_pipe(part, allow_pipe)
    if part.startswith("file://"):
        part = part.removeprefix("file://")
    try:
        names = list(braceexpand.braceexpand(part))
    except ValueError as error:
        raise DataError(f"cannot expand the braces of {part!r}: {error}. Write them like {{00000..00099}}.") from None
    found = []
    for name in names:
        if is_url(name):
            if "*" in name:
                raise DataError(f"{name!r}: globs work on local paths only. Use braces, like {{00000..00099}}.tar.")
            found.append(name)
        elif name.endswith(".txt"):
            found += _read_list(Path(name), allow_pipe)
        elif any(mark in name for mark in "*?[") and not Path(name).exists():
            matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (absolute patterns)
            if not matches:
                raise DataError(f"no tars match {name!r} (in {_short(spec)}). Is the path right?")
            found += matches
        elif Path(name).is_dir():
            raise DataError(f"{name!r} is a folder: name the tars in it, e.g. '{name.rstrip('/')}/*.tar'")
        else:
            found.append(name)
    return found


def _read_list(path: Path, allow_pipe: bool) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the shard list {path}: {error}") from None
    found = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        if line.endswith(".txt"):
            raise DataError(f"the shard list {path} names another list, {line!r}: list the tars themselves")
        beside = path.parent / line
        is_beside = not is_url(line) and not Path(line).exists() and beside.exists()
        found += [str(beside)] if is_beside else _expand_part(line, str(path), allow_pipe)
    return found


def _refuse_pipe(url: str, allow_pipe: bool) -> None:
    if not allow_pipe:
        raise DataError(
            f"{url!r}: 'pipe:' would run a shell command and is refused. Give a path or a plain URL, or --allow_pipe if you "
            "know the command."
        )


def _short(spec: str) -> str:
    return repr(spec if len(spec) <= 200 else spec[:200] + "...")


def is_url(path: str) -> bool:
    """True for s3://..., https://... and their like, and for pipe:COMMAND."""
    return "://" in path or path.startswith(PIPE)


def shard_name(path: str | Path) -> str:
    """'00012' of '.../00012.tar': what features and labels of a shard are named after; of a pipe, of its last such word."""
    if str(path).startswith(PIPE) and (tars := re.findall(r"([^/\s'\"=]+)\.tar\b", str(path))):
        return tars[-1]
    return str(path).split("?")[0].rstrip("/").rsplit("/", 1)[-1].removesuffix(".tar")


def local_shard(path: str, cache_dir: str | Path | None, allow_pipe: bool = False) -> Path:
    """A local path as it is; a URL fetched whole into `cache_dir` (once: later calls find it there).

    allow_pipe: of 'pipe:COMMAND' the output of that shell command is fetched.
    Where the connection or the server fails (`storage.is_away`), it is tried again after each of RETRY_SECONDS.
    Raises DataError when a URL comes without `cache_dir`, or cannot be fetched; UnreadableError when that lies in the
    machine: no room, no permission, no more open files, a server that is still away after the last try.
    """
    if path.startswith(PIPE):
        _refuse_pipe(path, allow_pipe)
    if not is_url(path):
        return Path(path)
    if cache_dir is None:
        raise DataError(f"{path} is remote: name a local folder to fetch tars into, --shard_cache FOLDER")
    # The URL's hash keeps equally named tars of different places apart; the file name keeps `shard_name` true.
    folder = Path(cache_dir) / hashlib.sha256(path.encode()).hexdigest()[:12]
    target = folder / f"{shard_name(path)}.tar"
    if target.exists():
        return target

    def fetch(sink) -> None:
        with _open_remote(path) as source:  # closed before the file gets its name: a failed curl may tell only then
            shutil.copyfileobj(source, sink, 1 << 22)

    def attempt() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(target, fetch)
        except DataError:
            raise
        except Exception as error:  # any backend's own exception types
            raise _not_fetched(path, target, error) from None

    retried(attempt, lambda error: isinstance(error, _AwayError), RETRY_SECONDS)
    return target


class _AwayError(UnreadableError):
    """A server, or the way there, fails: it may be back in a moment."""


def _not_fetched(path: str, target: Path, error: Exception) -> DataError:
    """What a failed fetch means."""
    text = f"cannot fetch {path} to {target}: {type(error).__name__}: {error}"
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM):
        return UnreadableError(f"{text}. Are the credentials valid, and may the cache folder be written to?")
    if number in MACHINE_ERRORS:
        return UnreadableError(f"{text}. {cure_of(number)}")
    if is_away(error) or _refused_by_server(path, error):
        return _AwayError(
            f"{text}. Its server does not answer, after {len(RETRY_SECONDS) + 1} tries: see that it is up and this host "
            "reaches it, then --resume auto."
        )
    return DataError(text)


def _refused_by_server(url: str, error: Exception) -> bool:
    """Whether curl, which gives one exit code for every HTTP status, was refused for a reason that lies in the server."""
    if not re.search(r"'curl'.*exit 22 \(read\)", str(error)):
        return False
    try:
        with urllib.request.urlopen(url, timeout=30):  # its headers: the contents are not asked for
            return True  # it is there now
    except Exception as answer:
        return is_away(answer)


def _open_remote(url: str):
    """A readable file of `url`: fsspec where it knows the protocol, else WebDataset's openers (curl, gsutil)."""
    if url.startswith(PIPE):
        return _output_of(url.removeprefix(PIPE))
    import fsspec

    try:
        return fsspec.open(url, "rb").open()
    except (ImportError, ValueError):  # no such protocol, or its package is not installed
        return import_webdataset().gopen(url, "rb")


@contextlib.contextmanager
def _output_of(command: str) -> Iterator[BinaryIO]:
    """What a shell command prints. Raises DataError, at the end, where it fails."""
    # Not by WebDataset's own pipes: for them it would have to be imported in its unsafe mode, which unpickles, too.
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        yield process.stdout
    if process.returncode:
        raise DataError(f"the command {command!r} failed with exit code {process.returncode}")


def import_webdataset():
    """The module webdataset, in its secure mode: no pipes, no unpickling."""
    os.environ.setdefault("WDS_SECURE", "1")  # read when webdataset is imported
    import webdataset

    return webdataset


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class TarState:
    """What tells that a local tar is still the one that was examined: bytes, and time of last change in ns.

    To be compared on one host alone: copies of a tar on other hosts have other times.
    """

    size: int
    mtime_ns: int

    @staticmethod
    def of(stat: os.stat_result) -> "TarState":
        """Of an open file."""
        return TarState(stat.st_size, stat.st_mtime_ns)

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.mtime_ns / 1e9).isoformat(" ", "milliseconds")
        return f"{self.size} bytes, written at {when}"


class ChangedTarError(UnreadableError):
    """A tar is not the one that was examined before."""


class OpenTar:
    """A local tar, open to be read by offsets; close it, or use it as a context.

    Read, not mapped: where a tar shrinks or its disk fails under a map, the process is ended (SIGBUS). state: as which it
    was examined before; None: whatever is found. waits: see `persistently`, which also tells what opening and reading raise.
    Raises ChangedTarError when it is opened, at first or again behind a stale handle, and is another.
    """

    def __init__(self, path: str | Path, waits: Sequence[float] = RETRY_SECONDS, state: TarState | None = None):
        self.path, self._waits, self._state = Path(path), waits, state
        self._file: int | None = persistently(self._open, f"the tar {path}", waits)

    @property
    def state(self) -> TarState:
        """As which it was opened."""
        return self._state

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._state.size

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._compare(file)
        except BaseException:
            os.close(file)
            raise
        return file

    def _compare(self, file: int) -> None:
        now = TarState.of(os.fstat(file))
        self._state = self._state or now
        if now != self._state:
            raise ChangedTarError(
                f"the tar {self.path} became another while it was read: it had {self._state}, now {now}. Start again with "
                "--resume auto."
            )

    def check(self) -> None:
        """Raises ChangedTarError where the open file has been written to since: what was read may be of another tar."""
        if self._file is not None:
            try:
                self._compare(self._file)
            except OSError:
                self._again(lambda: self._compare(self._file))

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`; fewer where the file ends before."""
        if self._file is not None:
            try:
                return os.pread(self._file, stop - start, start)
            except OSError:
                pass  # again, with patience
        return self._again(lambda: os.pread(self._file, stop - start, start))

    def _again(self, read: Callable[[], T]) -> T:
        def again() -> T:
            if self._file is None:
                self._file = self._open()
            try:
                return read()
            except OSError as error:
                if error.errno in SERVER_ERRORS:  # from a stale handle nothing more will come
                    self.close()
                raise

        try:
            return persistently(again, f"the tar {self.path}", self._waits)
        except OSError:
            self._waits = ()  # a bad disk: its other samples are not waited for
            raise

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "OpenTar":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------- what is inside


class MissingTarError(DataError):
    """A tar is not there."""


@dataclass(frozen=True)
class TarIndex:
    """Where everything is in a tar.

    keys: image samples in tar order. members: for each of them {extension in lower case: (byte offset, bytes)}.
    duplicates: members left out because their key and extension came before. ignored: members that are no file of a
    sample (links, devices, names without key or extension); folders are not counted. without_image: samples without an
    image, left out of `keys`. state: of the file that was walked.
    """

    path: Path
    keys: tuple[str, ...]
    members: dict[str, dict[str, tuple[int, int]]]
    duplicates: int = 0
    ignored: int = 0
    without_image: tuple[str, ...] = ()
    state: TarState | None = None

    def image(self, key: str) -> tuple[int, int]:
        """Byte offset and size of the image of `key`."""
        return self.members[key][image_extension(self.members[key])]


def image_extension(extensions: Iterable[str]) -> str | None:
    """The extension that holds a sample's image, None without one."""
    return next((ext for ext in IMAGE_EXTENSIONS if ext in extensions), None)


def split_name(name: str) -> tuple[str, str] | None:
    """('000123', 'jpg') of 'any/folder/000123.JPG'; ('a', 'b.jpg') of 'a.b.jpg'; None where one part is missing."""
    key, dot, extension = name.rsplit("/", 1)[-1].partition(".")
    return (key, extension.lower()) if key and dot and extension else None


def index_tar(path: str | Path) -> TarIndex:
    """Walks the headers of a local tar (USTAR, GNU, PAX, v7); reads no contents.

    Raises DataError, naming path and byte offset, for a tar that is cut (inside a member, inside a header, or at a
    member's end, before the end mark), has a damaged header or bytes after its end mark, or is no tar at all.
    """
    index, damage = examine_tar(path)
    if damage is not None:
        raise damage
    return index


def examine_tar(path: str | Path) -> tuple[TarIndex, DataError | None]:
    """What `index_tar` finds, and what it raises: of a damaged tar the members before the damage, which are whole.

    The error is a MissingTarError where there is no such file. Raises UnreadableError where the machine is to blame.
    """
    path = Path(path)
    nothing = TarIndex(path, (), {})
    try:
        with OpenTar(path) as tar:
            if tar.size == 0:
                return nothing, DataError(f"{path} is empty (0 bytes), not a tar. {_CURE}")
            return _index(tar)
    except FileNotFoundError as error:
        return nothing, MissingTarError(f"cannot read the tar {path}: {error}")
    except OSError as error:
        return nothing, DataError(f"cannot read the tar {path}: {error}")


def _index(tar: OpenTar) -> tuple[TarIndex, DataError | None]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    duplicates = ignored = 0
    damage = None
    try:
        for name, kind, offset, size in _walk(tar):
            if kind == b"5":
                continue
            parts = split_name(name) if kind in _REGULAR else None
            if parts is None:
                ignored += 1
                continue
            key, extension = parts
            members = samples.get(key)
            if members is None:
                samples[key] = {extension: (offset, size)}
            elif extension in members:
                duplicates += 1
            else:
                members[extension] = (offset, size)
    except UnreadableError:
        raise
    except DataError as error:
        damage = error
    except OSError as error:
        damage = DataError(f"cannot read the tar {tar.path} to its end: {error.strerror}. {_CURE}")
    images = {key: members for key, members in samples.items() if image_extension(members)}
    without = tuple(key for key in samples if key not in images)
    return TarIndex(tar.path, tuple(images), images, duplicates, ignored, without, tar.state), damage


def _walk(tar: OpenTar) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, type, offset of the contents, size) of each member, long names resolved; raises DataError at damage."""
    found = _walk_plain(tar)
    if found is None:
        yield from _walk_carefully(tar)
    else:
        members, end = found
        yield from members
        _check_rest(tar, end)


def _walk_plain(tar: OpenTar) -> tuple[list[tuple[str, bytes, int, int]], int] | None:
    """The walk over a tar of plain files, several times faster, and the byte of its end mark; None where anything else
    comes: look carefully.

    Extended headers that name neither path nor size (WebDataset's writer puts a time of change before every file) are passed
    over. The checksums are verified many at a time.
    """
    found: list[tuple[str, bytes, int, int]] = []
    headers: list[bytes] = []
    stated: list[int] = []
    window, base, position, end = b"", 0, 0, tar.size
    try:
        while True:
            start = position + BLOCK
            header = window[position - base : start - base]
            if len(header) < BLOCK:
                ahead = LARGE_WINDOW if 2 * (position - base) < LARGE_WINDOW else WINDOW
                window, base = tar.read(position, position + ahead), position
                header = window[:BLOCK]
            kind = header[156:157]
            if kind == b"\0" and header == _ZERO_BLOCK:
                break
            if kind not in (b"0", b"\0", b"x") or header[135] not in b" \0":
                return None
            size = int(header[124:135], 8)
            if size < 0 or start + size > end:
                return None
            headers.append(header)
            stated.append(int(header[148:155].rstrip(b"\0"), 8))
            if kind == b"x":
                records = tar.read(start, start + size)
                if b"path=" in records or b"size=" in records:
                    return None
            else:
                found.append((header[:100].split(b"\0", 1)[0].decode(), kind, start, size))
            position = start + (size + BLOCK - 1) // BLOCK * BLOCK
            if len(headers) == 4096:
                if not _checksums_fit(headers, stated):
                    return None
                headers, stated = [], []
    except (ValueError, IndexError, OSError):  # odd numbers or names, a cut header, a bad disk
        return None
    return (found, position) if _checksums_fit(headers, stated) else None


def _checksums_fit(headers: list[bytes], stated: list[int]) -> bool:
    """Whether the headers have the sums that they state."""
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    sums = table.sum(1, dtype=np.int64) - table[:, 148:156].sum(1, dtype=np.int64)
    return bool((sums + 8 * 32 == stated).all())  # the field itself counts as eight blanks


def _walk_carefully(tar: OpenTar) -> Iterator[tuple[str, bytes, int, int]]:
    """As `_walk`, whatever comes; raises DataError at the first damage, OSError where the disk fails."""
    path, position, end = tar.path, 0, tar.size
    long_name: str | None = None
    long_size: int | None = None
    last = "the beginning"
    while True:
        header = tar.read(position, position + BLOCK)
        if len(header) < BLOCK:
            where = "in a header" if header else "at the end of a member, before the end mark of the archive"
            raise DataError(f"the tar {path} is cut {where}: byte {position} (after {last}). {_CURE}")
        if header == _ZERO_BLOCK:
            _check_rest(tar, position)
            return
        if not _checksum_fits(header):
            raise DataError(_not_a_header(path, position, last, header))
        size = _number(header[124:136], path, position)
        kind = header[156:157]
        name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
        if kind in _LINKS_AND_SPECIAL:
            size = 0  # whatever the field says, no contents follow
        if long_size is not None and kind not in (b"x", b"g", b"L", b"K"):
            size = long_size
        start = position + BLOCK
        if start + size > end:
            raise DataError(
                f"the tar {path} is cut inside a member: {long_name or name!r} at byte {start} has {size} bytes, but "
                f"the file ends at byte {end}. {_CURE}"
            )
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind == b"L":
            long_name = tar.read(start, start + size).split(b"\0", 1)[0].decode("utf-8", "replace")
        elif kind == b"x":
            records = _pax_records(tar.read(start, start + size), path, start)
            long_name = records["path"] if "path" in records else long_name
            text = records.get("size", "")
            long_size = int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else long_size
        elif kind not in (b"g", b"K"):
            name = long_name or name
            yield name, kind, start, size
            last, long_name, long_size = f"member {name!r}", None, None


def _checksum_fits(header: bytes) -> bool:
    try:
        stated = int(header[148:156].split(b"\0", 1)[0].strip(), 8)  # none at all is none: zeros would fit by chance
    except ValueError:
        return False
    # The checksum field itself counts as eight blanks; a few old writers summed signed bytes.
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    if stated == unsigned:
        return True
    high = sum(byte > 127 for byte in header) - sum(byte > 127 for byte in header[148:156])
    return stated == unsigned - 256 * high


def _number(field: bytes, path: Path, position: int) -> int:
    if field[0] & 0x80:  # GNU's base 256, for 8 GB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    try:
        if not digits.isdigit():  # int() would take signs, and a negative size would walk in circles
            raise ValueError
        return int(digits, 8)
    except ValueError:
        raise DataError(f"the tar {path} has a damaged header at byte {position}: size {field!r}. {_CURE}") from None


def _pax_records(data: bytes, path: Path, position: int) -> dict[str, str]:
    records, rest = {}, data
    try:
        while rest and rest[:1] != b"\0":
            length = int(rest.split(b" ", 1)[0])
            record = rest[:length]
            if length < 5 or not record.endswith(b"\n"):
                raise ValueError
            name, _, value = record.split(b" ", 1)[1][:-1].partition(b"=")
            records[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
            rest = rest[length:]
    except (ValueError, IndexError):
        raise DataError(f"the tar {path} has a damaged extended header at byte {position}. {_CURE}") from None
    return records


def _check_rest(tar: OpenTar, position: int) -> None:
    """After the end mark only zeros may follow: else a zeroed region would hide the rest of the samples."""
    for start in range(position, tar.size, 1 << 20):
        chunk = tar.read(start, min(start + (1 << 20), tar.size))
        if chunk.count(0) != len(chunk):
            raise DataError(
                f"the tar {tar.path} has its end mark at byte {position}, but more data after byte {start}: a damaged "
                f"region, or tars glued together. {_CURE}"
            )


def _not_a_header(path: Path, position: int, last: str, header: bytes) -> str:
    if position:
        return f"the tar {path} has a damaged header at byte {position} (after {last}). {_CURE}"
    guess = ""
    if header.startswith(b"\x1f\x8b"):
        guess = " (it is gzip: unpack it first, tars are read uncompressed)"
    elif header.lstrip()[:1] == b"<":
        guess = " (it looks like an HTML page, so the download failed)"
    return f"{path} is not a tar file{guess}. {_CURE}"


# ---------------------------------------------------------------------------------------------- reading, writing


def read_member(source, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a tar: its path, or a buffer of it. Raises DataError where it is shorter."""
    if isinstance(source, (str, Path)):
        try:
            with OpenTar(source) as tar:
                data = tar.read(offset, offset + size)
        except OSError as error:
            raise DataError(f"cannot read the tar {source}: {error}") from None
    else:
        data = bytes(source[offset : offset + size])
    if len(data) != size:
        where = source if isinstance(source, (str, Path)) else "tar"
        raise DataError(f"{where}: {size} bytes wanted at byte {offset}, got {len(data)}: did the file change?")
    return data


def read_samples(
    path: str | Path, extensions: Iterable[str] | None = None, index: TarIndex | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: contents}) of every image sample of a local tar, in the order of `index_tar(path).keys`.

    extensions: read only these (lower case); None reads all. index: of this tar, where it is known. Raises DataError as
    `index_tar` does, before the first sample; later where the file has become shorter or cannot be read.
    """
    index = index_tar(path) if index is None else index
    wanted = None if extensions is None else {extension.lower() for extension in extensions}
    members = {key: _wanted(index.members[key], wanted) for key in index.keys} if wanted is not None else index.members
    first, end, total = _extent(members)
    try:
        with OpenTar(index.path) as tar:
            if end > tar.size:
                raise DataError(f"the tar {path} has {tar.size} bytes, its index says {end}: did the file change?")
            if index.state not in (None, tar.state):
                raise DataError(f"the tar {path} changed while it was read: it had {index.state}, now {tar.state}")
            ahead = 0
            if 2 * total > end - first:  # large members are not worth a copy: one read each, and one for the small ones
                ahead = READ_AHEAD if 8 * total < READ_AHEAD * len(members) else WINDOW
            window, base = b"", 0
            for key in index.keys:
                parts = {}
                for extension, (at, size) in members[key].items():
                    data = window[at - base : at - base + size] if at >= base else b""
                    if len(data) < size:
                        window, base = tar.read(at, at + max(size, ahead)), at
                        data = window[:size]
                        if len(data) < size:
                            raise DataError(
                                f"the tar {path} became shorter while it was read: {key}.{extension} is cut"
                            )
                    parts[extension] = data
                yield key, parts
    except OSError as error:
        raise DataError(f"cannot read the tar {path}: {error}") from None


def _wanted(members: dict[str, tuple[int, int]], wanted: set[str]) -> dict[str, tuple[int, int]]:
    return {extension: place for extension, place in members.items() if extension in wanted}


def _extent(members: dict[str, dict[str, tuple[int, int]]]) -> tuple[int, int, int]:
    """(first byte, end, bytes with headers and padding, roughly) of all these members."""
    first, end, total = sys.maxsize, 0, 0
    for places in members.values():
        for offset, size in places.values():
            total += size + 2 * BLOCK - 1  # at most: rounding to blocks would cost more than it tells
            if offset < first:
                first = offset
            if offset + size > end:
                end = offset + size
    return first, end, total


def stats_path(tar: str | Path) -> Path:
    """Where img2dataset writes what it knows of a local tar."""
    tar = Path(tar)
    return tar.with_name(tar.name.removesuffix(".tar") + "_stats.json")


def stated_samples(tar: str | Path) -> int:
    """How many samples a local tar holds according to the "successes" of its _stats.json; 0 where nothing tells."""
    try:
        found = json.loads(stats_path(tar).read_text(encoding="utf-8"))["successes"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not img2dataset's: it only serves a hint
        return 0
    return found if isinstance(found, int) else 0


def write_tar(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Writes (key, {extension: contents}) as a plain USTAR tar; returns the number of samples.

    Equal samples give equal bytes (time stamps are 0). The tar appears under its name when it is whole; then
    `<name>_stats.json` {"count", "successes"} is written beside it, img2dataset's mark of a finished shard.
    Raises DataError for a key that would not survive reading ('.' or '/' in it), or that comes twice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0

    def write(file) -> None:
        nonlocal count
        count = _write(path, file, samples)

    write_bytes(path, write)
    write_text(stats_path(path), json.dumps({"count": count, "successes": count}) + "\n")
    return count


def _write(path: Path, file, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    seen: set[str] = set()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            if not key or "." in key or "/" in key or key in seen:
                why = "comes twice" if key in seen else "is empty or holds '.' or '/'"
                raise DataError(f"cannot write {path}: the key {key!r} {why}")
            seen.add(key)
            for extension, contents in members.items():
                try:
                    _add(tar, f"{key}.{extension}", contents)
                except ValueError as error:  # longer than USTAR's 100 characters
                    raise DataError(f"cannot write {path}: the key {key!r}: {error}") from None
    return len(seen)


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    tar.addfile(info, io.BytesIO(contents))
