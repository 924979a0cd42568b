"""Where the time of a step goes: phases of it, a trace for people, and a table for the console and TensorBoard.

Phases follow each other without a gap, so their sum is the time of the steps. On a CPU a phase's time is that of the host;
on a GPU that of the stream that computes, between events, while the host runs ahead: "data" is then how long the GPU had
nothing to do. "communication" lies within the other phases: on a GPU the time of NCCL's kernels, part of it beside
computing; on a CPU the time of gloo's calls.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from mlcd_ds import collectives
from mlcd_ds.benchmarks.timing import table
from mlcd_ds.files import write_json
from mlcd_ds.monitor import Monitor
from mlcd_ds.topology import Topology

T = TypeVar("T")

DATA, FORWARD, HEAD, BACKWARD, OPTIMIZER, OTHER = "data", "encoder forward", "head", "backward", "optimizer", "other"
PHASES = (DATA, FORWARD, HEAD, BACKWARD, OPTIMIZER, OTHER)
"""data: waiting for images. head: sampling, gathering, loss and both gradients. backward: the encoder's, with ZeRO's
reductions. optimizer: norms, the steps of encoder and centers, ZeRO's gathers. other: reports, checkpoints."""

COMMUNICATION = "communication"


class PhaseClock:
    """Tells how long each phase lasted between `start` and `stop`; does nothing outside of them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._begun: list[tuple[str, object]] | None = None
        self._range = None

    def start(self, phase: str) -> None:
        """Begins to measure, in `phase`."""
        self._begun = []
        self.begin(phase)

    def begin(self, phase: str) -> None:
        """Ends the phase under way and begins another; in a trace each is a range of its name."""
        if self._begun is None:
            return
        self._end_range()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._begun.append((phase, now))
        self._range = torch.profiler.record_function(phase)
        self._range.__enter__()

    def stop(self) -> dict[str, float]:
        """{phase: seconds since `start`}. Waits for the device."""
        self.begin("")
        self._end_range()
        begun, self._begun = self._begun, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, at), (_, until) in itertools.pairwise(begun):
            seconds[phase] += at.elapsed_time(until) / 1e3 if self.device.type == "cuda" else until - at
        return seconds

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None


class StepProfiler:
    """Profiles the steps `first`..`last` (counted from 1) of a run; every rank has one.

    steps: (first, last), None: no step. folder: for trace_rankN.json.gz and steps.json. clock: the engine's. monitor: rank
    0's, else None. global_batch: images of a step.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: Path,
        topology: Topology,
        clock: PhaseClock,
        monitor: Monitor | None,
        global_batch: int,
    ):
        self.steps, self.folder, self.topology = steps, folder, topology
        self.clock, self.monitor, self.global_batch = clock, monitor, global_batch
        self._profile = None
        self._first = 0

    def timing_data(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields `batches`; waiting for them is the phase "data", what comes before the next step "other"."""
        arriving = iter(batches)
        while True:
            self.clock.begin(DATA)
            batch = next(arriving, None)
            self.clock.begin(OTHER)
            if batch is None:
                return
            yield batch

    def before_step(self, step: int) -> None:
        """Called before the `step`-th step, with its batch at hand: begins or ends the profile. Every rank calls it."""
        if self.steps is None:
            return
        first, last = self.steps
        if self._profile is not None and step > last:
            self._finish(last)
        elif self._profile is None and first <= step <= last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.topology.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
            self._first = step
            self.clock.start(OTHER)

    def close(self, steps: int) -> None:
        """After the last step, the `steps`-th. Every rank calls it."""
        if self._profile is not None:
            self._finish(steps)
        elif self.steps is not None and self.monitor is not None and not self._first:
            print(f"--profile_steps {self.steps[0]}-{self.steps[1]}: the run had no such step", flush=True)

    def _finish(self, last: int) -> None:
        seconds = self.clock.stop()
        self._profile.stop()
        seconds[COMMUNICATION] = communication_seconds(self._profile.key_averages())
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / f"trace_rank{self.topology.rank}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        self._profile = None
        steps = last - self._first + 1
        of_ranks = collectives.gather_objects({name: s / steps for name, s in seconds.items()}, self.topology)
        if self.monitor is None:
            return
        rows = phase_table(of_ranks)
        title = f"profile of steps {self._first}-{last}, {len(of_ranks)} ranks, a step"
        print(
            f"{title}:\n{table(rows)}\ntraces: {self.folder}/trace_rank*.json.gz (chrome://tracing, Perfetto)",
            flush=True,
        )
        write_json(self.folder / "steps.json", {"first": self._first, "last": last, "seconds_of_ranks": of_ranks})
        self.monitor.profile(last * self.global_batch, title, rows, mean_of_ranks(of_ranks))


def communication_seconds(averages: Iterable) -> float:
    """Of a profile's `key_averages()`: NCCL's kernels, or gloo's calls where there are no kernels."""
    kernels = sum(x.self_device_time_total for x in averages if x.key.startswith("nccl") and x.self_device_time_total)
    calls = sum(x.cpu_time_total for x in averages if x.key.startswith("gloo:"))
    return (kernels or calls) / 1e6


def mean_of_ranks(of_ranks: list[dict[str, float]]) -> dict[str, float]:
    """{phase: mean seconds}."""
    return {name: sum(own[name] for own in of_ranks) / len(of_ranks) for name in of_ranks[0]}


def phase_table(of_ranks: list[dict[str, float]]) -> list[dict[str, str]]:
    """Lines of a table: milliseconds of each phase, its share of the step, and the rank that takes longest."""
    mean = mean_of_ranks(of_ranks)
    whole = sum(mean[name] for name in PHASES) or 1.0
    rows = []
    for name in (*PHASES, COMMUNICATION):
        most = max(range(len(of_ranks)), key=lambda rank: of_ranks[rank][name])
        within = " (within these)" if name == COMMUNICATION else ""
        rows.append(
            {
                "phase": name + within,
                "ms": f"{mean[name] * 1e3:.1f}",
                "share": f"{mean[name] / whole:.1%}",
                "slowest rank": f"{most}: {of_ranks[most][name] * 1e3:.1f} ms",
            }
        )
    return [*rows, {"phase": "step", "ms": f"{whole * 1e3:.1f}"}]
