"""What a run needs of its machine: shared memory, open files, room on the disk; looked at before anything is built."""

import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlcd_ds.config import RunConfig
from mlcd_ds.data.loader import pieces_of
from mlcd_ds.data.shards import MAX_OPEN_FILES
from mlcd_ds.errors import CheckpointError, ConfigError

SHARED_MEMORY = Path("/dev/shm")
FILES_BESIDE = 256
"""Files that a process keeps open beside tars, batches and connections: libraries, logs, pipes."""
FILES_PER_RANK = 8
"""Connections to each other rank: a few process groups, with a pair each."""


@dataclass(frozen=True)
class Needs:
    """shared_memory: bytes on a host, at most. open_files: of one rank, at most. checkpoint: bytes of one. kept: checkpoints
    at a time, the one being written included. piece_memory, piece_files: shared memory of one piece of a batch, and the open
    files that it comes as: with less nothing runs.
    """

    shared_memory: int
    open_files: int
    checkpoint: int
    kept: int
    piece_memory: int = 0
    piece_files: int = 0


def needs_of(
    config: RunConfig,
    image_size: int,
    images_per_rank: int,
    local_world_size: int,
    world_size: int,
    checkpoint: int,
    total_steps: int,
) -> Needs:
    """What a run needs. checkpoint: bytes of one, see `memory.checkpoint_bytes`."""
    pieces = pieces_of(images_per_rank)
    # Each loader process reads `prefetch` pieces ahead; the loop holds two batches, and one more is put together. Where data
    # are what a run waits for, and a GPU takes them at once, little more than one piece is there at a time.
    under_way = (config.workers * config.prefetch + 3 * pieces) if config.workers else 0
    piece = -(-images_per_rank // pieces) * (3 * image_size**2 + 8 * config.labels_per_visit)
    for_good = 0 if config.keep_every is None else total_steps // config.keep_every
    return Needs(
        shared_memory=local_world_size * under_way * piece,
        open_files=FILES_BESIDE + MAX_OPEN_FILES + 2 * under_way + FILES_PER_RANK * world_size,
        checkpoint=checkpoint,
        kept=config.keep_last + 1 + for_good,
        piece_memory=piece if config.workers else 0,
        piece_files=2 if config.workers else 0,
    )


def check_machine(needs: Needs, run: Path) -> list[str]:
    """Raises the limit of open files where it may; returns warnings, in words, of what may become short.

    run: the run folder. Raises ConfigError where shared memory or open files cannot suffice, CheckpointError where not one
    checkpoint has room.
    """
    return [*_shared_memory(needs), *_open_files(needs), *_room(needs, run)]


def _shared_memory(needs: Needs) -> Sequence[str]:
    needed = needs.shared_memory
    if not needed or not SHARED_MEMORY.is_dir():
        return ()
    found = os.statvfs(SHARED_MEMORY)
    size, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    cure = (
        f"Enlarge it (mount -o remount,size={_gib(2 * needed)}G {SHARED_MEMORY}; in a container --shm-size or --ipc=host), "
        "or lower --workers or --prefetch"
    )
    if needs.piece_memory > size:
        raise ConfigError(
            f"one piece of a batch takes {_mb(needs.piece_memory)} of shared memory, {SHARED_MEMORY} has {_mb(size)}: the "
            f"loader processes would die. {cure}: --workers 0 needs none."
        )
    if needed <= free:
        return ()
    return (
        f"the loader processes of this host may need {_mb(needed)} of shared memory, {SHARED_MEMORY} has {_mb(size)}, of "
        f"which {_mb(free)} are free: where they are faster than the steps, they will die. {cure}.",
    )


def _open_files(needs: Needs) -> Sequence[str]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY == soft or needs.open_files <= soft:
        return ()
    if hard == resource.RLIM_INFINITY or needs.open_files <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needs.open_files, hard))
        return ()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cure = (
        f"Raise the limit (ulimit -n {needs.open_files}, LimitNOFILE= of a service, --ulimit nofile= of a container), or "
        "lower --workers or --prefetch"
    )
    now = _files_open_now()
    if now + needs.piece_files > hard:
        raise ConfigError(
            f"a rank has {now} files open and needs {needs.piece_files} more for each piece of a batch, this process may "
            f"have {hard} (ulimit -Hn). {cure}."
        )
    return (f"a rank may need {needs.open_files} open files, this process may have {hard} (ulimit -Hn). {cure}.",)


def _files_open_now() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    except OSError:
        return 0


def _room(needs: Needs, run: Path) -> Sequence[str]:
    free = shutil.disk_usage(run).free
    there = [path for path in (run / "checkpoints").glob("step_*/**/*") if path.is_file()]
    if free < needs.checkpoint and not there:
        raise CheckpointError(
            f"--output_dir {run} has {_mb(free)} free, one checkpoint takes about {_mb(needs.checkpoint)}. Make room, or "
            "choose another folder."
        )
    wanted = needs.kept * needs.checkpoint - sum(path.stat().st_size for path in there)
    if free >= wanted:
        return ()
    return (
        f"--output_dir {run} has {_mb(free)} free; {needs.kept} checkpoints at a time of about {_mb(needs.checkpoint)} each "
        f"will need {_mb(wanted)} more. Make room, or lower --keep_last, or keep fewer by --keep_every.",
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _gib(count: int) -> int:
    return -(-count // 2**30)
