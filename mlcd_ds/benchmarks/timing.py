"""Fair timing: contenders in turn in one process, ranks as processes of this machine, peak memory of one call."""

import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mlcd_ds import collectives
from mlcd_ds.config import Settings
from mlcd_ds.topology import Topology

Contender = Callable[[], object]


def time_in_turn(
    contenders: dict[str, Contender],
    repeats: int,
    topology: Topology,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """{name: {"min", "median", "all"}} in seconds. Each round calls every contender once, after a round not counted.

    Interleaved, so that a busy moment of the machine falls on all. With several ranks all start together, and a call took
    as long as on the slowest rank. clock: of what; time.process_time counts this process's CPU seconds alone, all threads'.
    """
    seconds = torch.zeros(repeats + 1, len(contenders), dtype=torch.float64, device=topology.device)
    for repeat in range(repeats + 1):
        say(f"round {repeat} of {repeats}")
        for column, contender in enumerate(contenders.values()):
            seconds[repeat, column] = time_once(contender, topology, clock)
    rounds = collectives.max_(seconds, topology)[1:].T.tolist()
    return {
        name: {"min": min(row), "median": statistics.median(row), "all": row}
        for name, row in zip(contenders, rounds, strict=True)
    }


def time_once(contender: Contender, topology: Topology, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, until the device is done, by `clock`."""
    collectives.barrier(topology)
    _synchronise(topology.device)
    started = clock()
    contender()
    _synchronise(topology.device)
    return clock() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_processes(count: int, function: Callable, *arguments) -> object:
    """What `function(rank, *arguments, folder)` returns for rank 0, as JSON, each of `count` ranks in a fresh process.

    folder: an empty one that they share. A failing rank ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_write_result, (function, arguments, Path(folder)), nprocs=count)
        return json.loads((Path(folder) / "result.json").read_text())


def _write_result(rank: int, function: Callable, arguments: tuple, folder: Path) -> None:
    result = function(rank, *arguments, folder)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """Most memory in use during one call, beyond what is in use before it.

    On a GPU what torch allocates; on a CPU the resident memory of this process, which should be fresh and warmed up.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays with the process would hide new memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status_bytes("VmRSS")
    contender()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def command_line(name: str, config: Settings) -> str:
    """The command line of a sub-command with the flags that were given, without the path of its output."""
    given = [
        f"--{field} {getattr(config, field)}" for field in type(config).model_fields if field in config.model_fields_set
    ]
    return " ".join([f"python tools/bench.py {name}", *(flag for flag in given if not flag.startswith("--output "))])


def table(lines: list[dict[str, str]]) -> str:
    """Aligned columns, the keys as their heads, "-" where a line has no such key."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [names, *([line.get(name, "-") for name in names] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
