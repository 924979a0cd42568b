"""Starts one process per rank of a script, as a launcher would, and collects how they end."""

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """A rank that has ended: exit code and everything it printed."""

    code: int
    output: str


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(world_size: int, arguments: list, **environment: str) -> list[tuple[subprocess.Popen, Path]]:
    """`python ARGUMENTS` once per rank; the processes with the files their output goes to."""
    port = free_port()
    started = []
    for rank in range(world_size):
        log = Path(tempfile.mkstemp(suffix=f".rank{rank}")[1])
        env = os.environ | {
            **{
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_SIZE": str(world_size),
            },
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
            **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            **environment,
        }
        command = [sys.executable, *map(str, arguments)]
        with log.open("w") as out:
            started.append((subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT), log))
    return started


def wait_ranks(started: list[tuple[subprocess.Popen, Path]], timeout: float = 180) -> list[Ended]:
    """How each rank ended; kills all and fails when one has not within `timeout` seconds."""
    try:
        return [Ended(process.wait(timeout), log.read_text()) for process, log in started]
    except subprocess.TimeoutExpired:
        raise AssertionError("a rank hangs:\n" + "\n".join(log.read_text()[-3000:] for _, log in started)) from None
    finally:
        for process, log in started:
            if process.poll() is None:
                process.kill()
            log.unlink(missing_ok=True)


def run_script(world_size: int, arguments: list, timeout: float = 180, **environment: str) -> list[Ended]:
    """`start_ranks` and `wait_ranks`."""
    return wait_ranks(start_ranks(world_size, arguments, **environment), timeout)
