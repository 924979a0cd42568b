"""What happens beside the loop: signals, a launcher that is gone, signs of life between ranks, waits that last too long.

Two threads of each rank. One hears signals even while the main thread stands in a collective, looks after the launcher
and times the waits for data. The other tells the ranks' store, every BEAT_SECONDS, that this process lives and what it
does; a rank whose collective has failed reads there who has fallen silent. SIGUSR2 makes a rank (or a loader process) print
the Python stacks of its threads; a rank that ends because of a hang prints them by itself.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mlcd_ds.errors import DataError, PeerError, Preempted
from mlcd_ds.topology import Topology

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks the run to save and stop."""

STACKS_SIGNAL = signal.SIGUSR2
"""Makes a process print the stacks of its threads, and go on."""
STDERR = 2

BEAT_SECONDS = 2.0
LAST_WORD_SECONDS = 5.0
"""So long a process that is ended from beside its main thread may take to note why."""
ONE_REQUEST_SECONDS = 1.0
"""Signals that come so soon after each other are one request: a launcher passes on what a terminal has sent already."""

_LAUNCHERS = ("deepspeed.launcher.launch", "launcher/launch.py", "torch.distributed.run", "torchrun")
_RUNNERS = ("deepspeed",)
_GROUP_ERRORS = ("gloo", "Timed out", "Connection closed", "NCCL", "Connection reset", "Broken pipe")


@dataclass
class _Doing:
    """What a rank does. step: finished steps. what: for people. since: time.monotonic()."""

    step: int
    what: str
    since: float


class Watch:
    """One rank's watch over its run. Use it as a context: within it the signals are handled.

    timeout_minutes: the longest wait for data; other ranks have their own limit in the process groups. warn_seconds: a
    wait for data above it is told. on_end: called with the reason before the process is ended from here.
    """

    def __init__(
        self,
        topology: Topology,
        timeout_minutes: float,
        warn_seconds: float,
        on_end: Callable[[str], object] = lambda reason: None,
    ):
        self.topology, self.timeout_minutes, self.warn_seconds = topology, timeout_minutes, warn_seconds
        self.on_end = on_end
        self.stop_reason = ""
        """Why this rank was asked to stop; "" while it was not."""
        self.in_loop = False
        """Whether steps have begun, at whose ends wishes are heard."""
        self._doing = _Doing(0, "starts", time.monotonic())
        self._signals: dict[int, float] = {}  # when each came first
        self._ended, self._silent = threading.Event(), threading.Event()
        self._ancestors = _launchers()
        self._warned = 0.0
        self._raised = False
        self._before: dict[int, object] = {}
        self._store = None

    def __enter__(self) -> "Watch":
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        faulthandler.register(STACKS_SIGNAL, file=STDERR, all_threads=True)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget_in_child)
        self._threads = [threading.Thread(target=self._listen, name="mlcd-watch", daemon=True)]
        if self.topology.is_distributed and dist.is_initialized():
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(seconds=BEAT_SECONDS * 2))
            self._beat(0)
            self._threads.append(threading.Thread(target=self._keep_beating, name="mlcd-beat", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self.stop_beating()
        signal.set_wakeup_fd(self._wakeup_before)
        faulthandler.unregister(STACKS_SIGNAL)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        with contextlib.suppress(BlockingIOError):
            self._writer.send(b"\0")  # no signal's number: it wakes the listener
        self._threads[0].join()
        self._reader.close()
        self._writer.close()

    def stop_beating(self) -> None:
        """For a rank that is about to end by an error of its own: the store may go before it does."""
        self._silent.set()

    def does(self, what: str, step: int) -> None:
        """Notes what this rank does from now on. step: steps finished."""
        self._doing = _Doing(step, what, time.monotonic())

    def enter_loop(self) -> None:
        """From now on a signal is a wish, heard at the next step. Raises Preempted where one has come already."""
        self.in_loop = True
        if self.stop_reason:
            raise Preempted(f"stopped by {self.stop_reason} before the first step; nothing was to be saved")

    def stop_wanted(self) -> bool:
        """Whether this rank was asked to stop."""
        return bool(self.stop_reason)

    # --- signals

    def _heard(self, number: int, frame: object) -> None:
        """Python's handler, in the main thread: while the run starts there is no step to wait for."""
        name = signal.Signals(number).name
        self.stop_reason = self.stop_reason or name
        if not self.in_loop and not self._raised:
            self._raised = True
            raise Preempted(f"stopped by {name} before the first step; nothing was to be saved")

    def _forget_in_child(self) -> None:
        """A loader process shares neither the handlers nor the pipe; it ends with the process it works for."""
        if not self._ended.is_set():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _listen(self) -> None:
        self._reader.settimeout(1.0)
        looked = 0.0
        while not self._ended.is_set():
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                numbers = b""
            except OSError:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._count(number)
            if time.monotonic() - looked >= 1.0:
                looked = time.monotonic()
                self._look_after_launcher()
                self._time_wait_for_data()

    def _count(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self._signals:
            self.stop_reason = self.stop_reason or name
            if self.in_loop:
                self._say(f"{name}: saves and stops after this step; a second {name} ends it at once")
        if now - self._signals.setdefault(number, now) >= ONE_REQUEST_SECONDS:
            self._end(f"a second {name}", 128 + number)

    def _look_after_launcher(self) -> None:
        if not self.stop_reason:
            gone = next((text for text, alive in self._ancestors if not alive()), None)
            if gone is not None:
                self.stop_reason = f"{gone} is gone"
                self._say(f"{self.stop_reason}: saves and stops after this step")

    def _time_wait_for_data(self) -> None:
        doing = self._doing
        waited = time.monotonic() - doing.since
        if doing.what != WAITS_FOR_DATA:
            self._warned = 0.0
        elif waited > self.timeout_minutes * 60:
            self._end(
                f"no data for step {doing.step + 1} within --timeout_minutes {self.timeout_minutes:g}: a reader is stuck. "
                "Is the storage of the shards there?",
                DataError.exit_code,
            )
        elif waited > self.warn_seconds and waited - self._warned > self.warn_seconds:
            self._warned = waited
            self._say(
                f"WARNING: has waited {waited:.0f} s for the data of step {doing.step + 1}: slow storage, or too few "
                "--workers"
            )

    def _end(self, reason: str, code: int) -> None:
        """Ends this process from beside its main thread, which may stand in a collective."""
        _print_stacks()
        self._say(f"ends at once: {reason}")
        # The run folder may lie on the very storage that hangs: whoever writes there is not waited for, for long.
        telling = threading.Thread(target=self.on_end, args=(reason,), daemon=True)
        telling.start()
        telling.join(LAST_WORD_SECONDS)
        os._exit(code)

    def _say(self, text: str) -> None:
        print(f"rank {self.topology.rank}: {text}", flush=True)

    # --- signs of life

    def _keep_beating(self) -> None:
        beat = 0
        while not self._silent.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._beat(beat)
            except RuntimeError:  # rank 0, which holds the store, is gone, or frozen: it may come back
                continue

    def _beat(self, beat: int) -> None:
        doing = self._doing
        seconds = round(time.monotonic() - doing.since)
        self._store.set(_key(self.topology.rank), json.dumps([beat, doing.step, doing.what, seconds]))

    def _read(self) -> dict[int, list]:
        """{rank: [beat, step, what, seconds]} of those that ever told. Raises RuntimeError where the store is gone."""
        keys = [_key(rank) for rank in range(self.topology.world_size)]
        return {r: json.loads(self._store.get(key)) for r, key in enumerate(keys) if self._store.check([key])}

    def _read_twice(self, found: list[dict[int, list]]) -> None:
        """Two readings, two beats and a second apart. In a thread: a store that was frozen answers nothing, not even no."""
        with contextlib.suppress(RuntimeError):
            found.append(self._read())
            time.sleep(2 * BEAT_SECONDS + 1)
            found.append(self._read())

    def peers(self) -> str:
        """Which ranks have fallen silent, and what the slowest of the others do. Takes two beats and a second."""
        found: list[dict[int, list]] = []
        reader = threading.Thread(target=self._read_twice, args=(found,), daemon=True)
        reader.start()
        reader.join(2 * BEAT_SECONDS + 3)
        if len(found) < 2:
            return "rank 0, which holds the ranks' store, does not answer"
        before, now = found
        ranks = [rank for rank in range(self.topology.world_size) if rank != self.topology.rank]
        silent = [rank for rank in ranks if rank not in now or now[rank] == before.get(rank)]
        behind = sorted((now[rank][1], -now[rank][3], rank) for rank in ranks if rank in now and rank not in silent)
        parts = []
        if silent:
            last = [f"rank {r} {now[r][2]} after step {now[r][1]}" for r in silent[:3] if r in now]
            parts.append(
                f"rank(s) {_few(silent)} do not answer" + (f" (last heard of: {', '.join(last)})" if last else "")
            )
        if behind:
            told = [f"rank {r} {now[r][2]} after step {step}, for {-s} s" for step, s, r in behind[:3]]
            parts.append(f"alive: {', '.join(told)}" + (", ..." if len(behind) > 3 else ""))
        return "; ".join(parts)

    @contextlib.contextmanager
    def naming_peers(self) -> Iterator[None]:
        """Turns a collective's failure within it into a PeerError with rank, step, collective, and who is silent."""
        try:
            yield
        except RuntimeError as error:
            if not self.topology.is_distributed or not any(words in str(error) for words in _GROUP_ERRORS):
                raise
            where = _collective(error)
            reason = re.sub(r"^\[\S*\]\s*", "", str(error).strip().splitlines()[0]).partition(". This is typ")[0][:200]
            doing = self._doing
            frames = "".join(traceback.format_tb(error.__traceback__))
            print(
                f"rank {self.topology.rank} stood in {where}, whose stack was:\n{frames}", file=sys.stderr, flush=True
            )
            raise PeerError(
                f"rank {self.topology.rank} {doing.what} after step {doing.step}: {where} failed ({reason}); "
                f"{self.peers()}. Start again with --resume auto; where all ranks are alive, raise --timeout_minutes."
            ) from error


WAITS_FOR_DATA = "waits for data"


def _print_stacks() -> None:
    """The Python stack of every thread, to the standard error: where the main thread stands that does not end by itself."""
    with contextlib.suppress(OSError, ValueError):  # a closed standard error
        faulthandler.dump_traceback(file=STDERR, all_threads=True)


def _key(rank: int) -> str:
    return f"mlcd_ds/beat/{rank}"


def _few(ranks: list[int]) -> str:
    return str(ranks) if len(ranks) <= 8 else f"{str(ranks[:8])[:-1]}, ... {len(ranks)} in all]"


def _collective(error: BaseException) -> str:
    """The collective that raised, and who called it: "all_reduce in sharded_norms (optim.py:45)"."""
    frames = traceback.extract_tb(error.__traceback__)
    kind = next((f.name for f in reversed(frames) if f.filename.endswith("distributed_c10d.py")), None)
    if kind is None:  # one that was started before, and waited for here
        kind = "all_gather" if any(f.name == "finish" for f in frames) else "a collective"
    here = Path(__file__).parent
    ours = [
        f
        for f in frames
        if here in Path(f.filename).parents and Path(f.filename).name not in ("collectives.py", "watch.py")
    ]
    if not ours:
        return kind
    return f"{kind} in {ours[-1].name} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"


def _launchers() -> list[tuple[str, Callable[[], bool]]]:
    """(what, whether it is still there) of the launcher's processes above this one; none where no launcher is known.

    A shell is no launcher: a run started with nohup outlives it. DeepSpeed's runner starts a launcher on each host, which
    starts the ranks; ended by a signal, the runner leaves both behind.
    """
    parent = os.getppid()
    if not any(words in _command(parent) for words in _LAUNCHERS):
        return []
    found = [(f"the launcher (process {parent})", lambda: os.getppid() == parent)]
    runner = _parent_of(parent)
    if runner is not None and runner > 1 and any(words in _command(runner) for words in _RUNNERS):
        found.append((f"the runner (process {runner})", lambda: _parent_of(parent) == runner))
    return found


def _command(process: int) -> str:
    """Its command line; "" where the system does not tell."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent_of(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
