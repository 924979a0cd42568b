"""Starts one process per rank of a script, as a launcher would, and collects how they end."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
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


READ_AT_IMPORT = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "TRITON_INTERPRET")
"""Of the environment: a fork has what they were when torch was imported."""


class ForkServer:
    """fork_server.py, for the processes of this one."""

    def __init__(self, environment: dict[str, str]):
        self.fixed = {name: environment.get(name) for name in READ_AT_IMPORT}
        self._lock = threading.Lock()
        answers, end = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "fork_server.py", str(end)], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[end],
        )  # fmt: skip
        os.close(end)
        self._answers = os.fdopen(answers)
        atexit.register(self.close)

    def ask(self, **request):
        """The answer to a request."""
        with self._lock:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._answers.readline()
        assert line, "tests/fork_server.py has ended"
        return json.loads(line)

    def close(self) -> None:
        """Ends it, and what it has forked."""
        self._process.stdin.close()
        self._process.wait()


@functools.cache
def fork_server() -> ForkServer:
    """One for all tests of this process."""
    return ForkServer(environment_of_ranks())


class Forked:
    """A process of the fork server, by the methods of subprocess.Popen that are needed."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        script, *arguments = command
        self.returncode: int | None = None
        self.pid: int = fork_server().ask(
            script=script, arguments=arguments, environment=environment, log=str(log.absolute())
        )

    def poll(self) -> int | None:
        """Exit code; None while it lives."""
        if self.returncode is None:
            self.returncode = fork_server().ask(wait=self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Exit code; subprocess.TimeoutExpired where it still lives after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def environment_of_ranks() -> dict[str, str]:
    """Of every rank, but for its place."""
    mine = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return os.environ | mine | {"GLOO_SOCKET_IFNAME": "lo"}


def start_ranks(
    world_size: int, arguments: list, fresh: bool = False, **environment: str
) -> list[tuple[subprocess.Popen | Forked, Path]]:
    """`python ARGUMENTS` once per rank; the processes with the files their output goes to.

    They are forks of a process that has imported torch and DeepSpeed already; fresh: interpreters that begin with nothing.
    """
    port = free_port()
    started = []
    for rank in range(world_size):
        log = Path(tempfile.mkstemp(suffix=f".rank{rank}")[1])
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = environment_of_ranks() | {name: str(value) for name, value in place.items()} | environment
        command = list(map(str, arguments))
        if not fresh and all(env.get(name) == value for name, value in fork_server().fixed.items()):
            started.append((Forked(command, env, log), log))
            continue
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *command], env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
            )
        started.append((process, log))
    return started


def wait_ranks(started: list[tuple[subprocess.Popen | Forked, Path]], timeout: float = 180) -> list[Ended]:
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


def run_script(
    world_size: int, arguments: list, timeout: float = 180, fresh: bool = False, **environment: str
) -> list[Ended]:
    """`start_ranks` and `wait_ranks`."""
    return wait_ranks(start_ranks(world_size, arguments, fresh, **environment), timeout)
