"""Files that are whole or not there: written under a temporary name, synced, renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mlcd_ds.errors import DataError, SaveError

STALE_SECONDS = 3600.0
"""A temporary file that has not grown for so long is left over, whoever wrote it: a live one grows all the time."""


VISIBLE_SECONDS = 60.0
"""So long a file may be unseen by other hosts after it was written: network file systems keep what they have looked up."""


_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


def temporary_name(path: Path) -> Path:
    """Where this process writes what will be `path`: NAME.HOST.PID.tmp beside it."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")  # two processes may write one file


def remove_stale(*folders: Path) -> int:
    """Removes what killed processes left half written in these folders; returns how many files.

    A temporary file is left over when its process was on this host and is gone, or after STALE_SECONDS of no change.
    """
    removed = 0
    for folder in folders:
        for file in folder.glob("*.tmp") if folder.is_dir() else ():
            if file.is_file() and _is_stale(file):
                file.unlink(missing_ok=True)
                removed += 1
    return removed


def _is_stale(file: Path) -> bool:
    name, _, process = file.name.removesuffix(".tmp").rpartition(".")
    try:
        idle = time.time() - file.stat().st_mtime
    except FileNotFoundError:  # finished or removed a moment ago
        return False
    if idle > STALE_SECONDS:
        return True
    return process.isdigit() and name.endswith(f".{socket.gethostname()}") and not Path(f"/proc/{process}").exists()


def write_bytes(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces `path` by what `write(file)` writes, so that a reader or a crash sees the old file or the new one.

    Nothing is left behind when `write` raises.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def plain_write_errors(path: str | Path) -> Iterator[None]:
    """Makes an OSError of what safetensors and torch.save raise when a file cannot be written.

    safetensors: "... I/O error: No space left on device (os error 28)"; torch: "write(): fd 3 failed with ..." or a
    failed check of its zip writer's. Their other errors pass.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not re.search(r"os error \d|fd \d+ failed with|inline_container", str(error)):
            raise
        code = re.search(r"os error (\d+)", str(error))
        text = f"torch could not write: {error}" if code is None else os.strerror(int(code.group(1)))
        raise OSError(int(code.group(1)) if code else errno.EIO, text, str(path)) from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of CPU copies, readable by whom the umask lets (the library makes it private).

    Raises OSError where it cannot be written.
    """
    with plain_write_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def make_folder(path: Path) -> Path:
    """Makes a folder to write into, and returns it. Raises DataError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder {path} cannot be made ({error.strerror}): choose another place to write to, or mend its permissions"
        ) from None
    return path


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """`target`.tmp to write into; within it all is written, then it is synced and gets its name. A `target` that is there
    is replaced.

    Nothing is left of it where something fails. Raises SaveError where a disk is full or read-only.
    """
    staging, before = target.with_name(f"{target.name}.tmp"), target.with_name(f"{target.name}.replaced.tmp")
    try:
        with _save_errors(target):
            shutil.rmtree(staging, ignore_errors=True)  # of a process that died over it
            staging.mkdir(parents=True)
            yield staging
            for path in sorted(staging.rglob("*")):
                sync_folder(path) if path.is_dir() else sync_file(path)
            sync_folder(staging)
            if target.exists():
                shutil.rmtree(before, ignore_errors=True)
                target.rename(before)
            staging.rename(target)
            sync_folder(target.parent)
            shutil.rmtree(before, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if before.exists() and not target.exists():
            before.rename(target)
        raise


@contextlib.contextmanager
def nothing_half(target: Path) -> Iterator[None]:
    """Removes the folder `target`, which was absent or empty, where something within fails.

    Raises SaveError where a disk is full or read-only.
    """
    try:
        with _save_errors(target):
            yield
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


@contextlib.contextmanager
def _save_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        raise SaveError(
            f"{target} could not be written, nothing of it is left: {error}. Make room on the disk, or choose another "
            "folder."
        ) from error


def comes_into_sight(is_there: Callable[[], bool], seconds: float | None = None) -> bool:
    """Whether `is_there()`, waited for at most so long (VISIBLE_SECONDS): for what another host has written just now."""
    until = time.monotonic() + (VISIBLE_SECONDS if seconds is None else seconds)
    while not is_there():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def sync_file(path: Path) -> None:
    """Waits until the bytes of `path` are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder (a rename just made) are on the disk, where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # fsync is for files alone there
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:
    # Python 3.10 has no file_digest.
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
