"""Numbers of a run: console, metrics.jsonl, and whatever monitors the DeepSpeed JSON enables.

Tags follow DeepSpeed's: `Train/Samples/NAME`, the x-axis in samples. Only rank 0 writes.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlcd_ds.files import write_text

TAG = "Train/Samples/"


def never_stopping(function: Callable, what: str) -> Callable:
    """`function`, whose OSErrors (a full disk) are told once and do not end a run: `what` is then incomplete."""
    warned = False

    def call(*arguments, **options):
        nonlocal warned
        try:
            return function(*arguments, **options)
        except OSError as error:
            if not warned:
                print(f"WARNING: {what} cannot be written ({error}); the run goes on without", flush=True)
            warned = True

    return call


class Monitor:
    """Writes the numbers of one run, on rank 0.

    write_events: DeepSpeed's `monitor.write_events`, taking (tag, value, samples). tensorboard: its SummaryWriter, or None.
    A run resumed at `first_step` loses the lines and points that the steps to be repeated had left.
    """

    def __init__(
        self, folder: Path, write_events: Callable[[list], None], tensorboard: Any, first_step: int, samples: int
    ):
        self.write_events = write_events
        self.tensorboard = tensorboard
        path = folder / "metrics.jsonl"
        if first_step and path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= first_step]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a" if first_step else "w")
        # Lines that find no room on the disk wait in the file's buffer.
        self._write_line = never_stopping(self._write_line, "metrics.jsonl")
        self._sync_file = never_stopping(self._sync_file, "metrics.jsonl")
        self._close_file = never_stopping(self._file.close, "metrics.jsonl")
        if tensorboard is not None:
            self._add_histogram = never_stopping(tensorboard.add_histogram_raw, "TensorBoard's log")
            self._add_text = never_stopping(tensorboard.add_text, "TensorBoard's log")
            self._flush_tensorboard = never_stopping(tensorboard.flush, "TensorBoard's log")
        if tensorboard is not None:  # from scratch, too: an attempt may have died before its first checkpoint
            _purge_points_after(tensorboard, samples)

    def scalars(self, step: int, samples: int, values: dict[str, float | int | None]) -> None:
        """One line of metrics.jsonl with all values, and one event for each; None values are left out.

        A number that is none (a skipped step's gradient norm) is null in the file, which else would be no JSON.
        """
        values = {name: value for name, value in values.items() if value is not None}
        written = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        line = {"step": step, "samples": samples, "time": round(time.time(), 3), **written}
        numbers = [(TAG + name, value, samples) for name, value in values.items() if not isinstance(value, str)]
        self._write_line(json.dumps(line, allow_nan=False) + "\n")
        self.write_events(numbers)

    def _write_line(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def _sync_file(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def histogram(self, samples: int, name: str, counts: Sequence[float], low: float, high: float) -> None:
        """Counts of equal bins over [low, high] to TensorBoard. An empty histogram is left out: there is nothing to draw."""
        total = sum(counts)
        if self.tensorboard is None or not total:
            return
        width = (high - low) / len(counts)
        edges = [low + width * (i + 1) for i in range(len(counts))]
        middles = [edge - width / 2 for edge in edges]
        self._add_histogram(
            TAG + name,
            min=low,
            max=high,
            num=int(total),
            sum=sum(c * m for c, m in zip(counts, middles, strict=True)),
            sum_squares=sum(c * m * m for c, m in zip(counts, middles, strict=True)),
            bucket_limits=edges,
            bucket_counts=list(counts),
            global_step=samples,
        )

    def profile(self, samples: int, title: str, rows: list[dict[str, str]], seconds: dict[str, float]) -> None:
        """A table of text to TensorBoard, and one event `Profile/NAME_ms` for each of `seconds`.

        rows: lines of the table, each with the heads it has a cell for.
        """
        self.write_events([(f"Profile/{name.replace(' ', '_')}_ms", s * 1e3, samples) for name, s in seconds.items()])
        if self.tensorboard is not None:
            heads = list(dict.fromkeys(head for row in rows for head in row))
            lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
            text = "\n".join(["| " + " | ".join(line) + " |" for line in lines])
            self._add_text("Profile/steps", f"{title}\n\n{text}", samples)

    def sync(self) -> None:
        """Brings what was written to the disk: called with every checkpoint, so that no checkpoint is ahead of its log."""
        self._sync_file()
        if self.tensorboard is not None:
            self._flush_tensorboard()

    def close(self) -> None:
        """Ends the files."""
        self.sync()
        self._close_file()


def _step_of(line: str) -> int | None:
    """The step of a line; None for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None


def _purge_points_after(writer: Any, samples: int) -> None:
    """Tells TensorBoard to drop points beyond `samples` that the interrupted run has written."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    event = Event(step=samples + 1, session_log=SessionLog(status=SessionLog.START))
    writer.file_writer.event_writer.add_event(event)
