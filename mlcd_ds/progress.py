"""What a run tells while it runs: speed, waits, losses, cosines, to the console line and the monitor."""

import itertools
import resource
import time
import zlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch

from mlcd_ds import collectives
from mlcd_ds.batch import ImageLabelBatch, head_suffix
from mlcd_ds.data.loader import ImageLabelLoader
from mlcd_ds.monitor import Monitor
from mlcd_ds.topology import Topology
from mlcd_ds.watch import WAITS_FOR_DATA, Watch

T = TypeVar("T")


class Progress:
    """Times the loop and reports its steps. Every rank calls it; rank 0, which has the monitor, prints and writes.

    total_steps, first_step: of the run and where it starts. global_batch: images. samples_per_epoch: images. watch: is told
    of waits for data.
    """

    def __init__(
        self,
        monitor: Monitor | None,
        topology: Topology,
        *,
        first_step: int,
        total_steps: int,
        global_batch: int,
        samples_per_epoch: int,
        watch: Watch,
    ):
        self.monitor, self.topology, self.watch = monitor, topology, watch
        self.total_steps, self.global_batch, self.samples_per_epoch = total_steps, global_batch, samples_per_epoch
        self._started = self._last_report = time.monotonic()
        self.first_step = self._last_step = first_step
        self._waited = 0.0

    def timing_waits(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields `batches`, noting how long each one was waited for; the watch tells of long waits while they last."""
        arriving = iter(batches)
        for step in itertools.count(self.first_step):
            self.watch.does(WAITS_FOR_DATA, step)
            asked = time.monotonic()
            try:
                batch = next(arriving)
            except StopIteration:
                return
            self._waited += time.monotonic() - asked
            self.watch.does("computes", step)
            yield batch

    def report(
        self,
        step: int,
        batch: ImageLabelBatch,
        result,
        loader: ImageLabelLoader,
        skipped_steps: int,
        histograms: bool,
    ) -> None:
        """Reports the `step`-th finished step, and the time since the last report. Two all-reduces of a few numbers.

        Samples are counted over the whole run, before a resume, too. result: engine.StepResult of this step. skipped_steps:
        of the whole run. Raises DataError, on every rank, when too many samples could not be used.
        """
        now = time.monotonic()
        seconds = now - self._last_report
        decoded, reasons = loader.count_skipped(final=step == self.total_steps)
        waits = torch.tensor([self._waited, 1.0], device=self.topology.device)
        waited, ranks = collectives.sum_(waits, self.topology).tolist()
        steps = step - self._last_step
        self._last_report, self._last_step, self._waited = now, step, 0.0
        if self.monitor is None:
            return
        stats = {name: value for name, value in result.stats.items() if value.dim() == 0}
        values = {
            "train_loss": result.loss,
            **{name: float(value) for name, value in stats.items()},
            "lr_encoder": result.learning_rate,  # not "lr": DeepSpeed writes that tag itself, one step ahead
            **({"lr_head": result.head_learning_rate} if result.head_grad_norms else {}),
            "grad_norm": result.grad_norm,
            **{f"head_grad_norm{head_suffix(head)}": norm for head, norm in enumerate(result.head_grad_norms)},
            "skipped_steps": skipped_steps,
            "samples_per_second": steps * self.global_batch / seconds,
            "data_wait_fraction": waited / (seconds * ranks),
            "memory_gb": self._memory_gb(),
            "epoch": step * self.global_batch / self.samples_per_epoch,
            "samples_decoded": decoded,
            "samples_skipped": reasons.total(),
            **{f"samples_skipped_{reason}": count for reason, count in sorted(reasons.items())},
        }
        samples = step * self.global_batch
        # Not for a curve: it lets two runs be compared for having seen the same images.
        line = {**values, "batch_crc32": f"{zlib.crc32(' '.join(batch.keys).encode()):08x}"}
        self.monitor.scalars(step, samples, line)
        if histograms:
            for name, counts in result.stats.items():
                if name.startswith("histogram_"):
                    self.monitor.histogram(samples, f"cosine_{name}", counts.tolist(), -1.0, 1.0)
        print(self._console_line(step, values, len(result.head_grad_norms)), flush=True)

    def _console_line(self, step: int, values: dict, heads: int) -> str:
        done = step - self.first_step
        left = (time.monotonic() - self._started) / done * (self.total_steps - step)
        parts = [
            f"step {step}/{self.total_steps}",
            f"epoch {values['epoch']:.2f}",
            *(self._of_heads(values, heads) if heads else self._of_pairs(values)),
            f"{values['samples_per_second']:,.0f} img/s",
            f"data wait {values['data_wait_fraction']:.0%}",
            f"{values['memory_gb']:.1f} GB",
            f"left {timedelta(seconds=round(left))}",
        ]
        if values["skipped_steps"] or values["samples_skipped"]:
            parts.append(f"skipped {values['skipped_steps']} steps, {values['samples_skipped']} images")
        return " | ".join(parts)

    @staticmethod
    def _of_heads(values: dict, heads: int) -> list[str]:
        # A head's loss is the sum of its two parts; train_loss is that of all heads, weighted.
        others = [values[f"loss_positive_{i}"] + values[f"loss_negative_{i}"] for i in range(1, heads)]
        return [
            f"loss {values['train_loss']:.3f} (pos {values['loss_positive']:.3f} neg {values['loss_negative']:.3f})",
            *[f"head {i} loss {loss:.3f}" for i, loss in enumerate(others, start=1)],
            f"cos pos {values['cosine_positive']:.3f} neg {values['cosine_negative']:.3f}",
            f"lr {values['lr_encoder']:.2e}",
            f"grad {values['grad_norm']:.2f} head {values['head_grad_norm']:.2f}",
            f"rows {values['sampled_rows']:.0f} ({values['positive_rows']:.0f} pos)",
        ]

    @staticmethod
    def _of_pairs(values: dict) -> list[str]:
        """Of a run on captions."""
        return [
            f"loss {values['train_loss']:.3f}",
            f"cos pos {values['cosine_positive']:.3f}",
            f"right {values['accuracy_image_to_text']:.1%} of images {values['accuracy_text_to_image']:.1%} of texts",
            f"scale {values['logit_scale']:.1f}",
            f"lr {values['lr_encoder']:.2e}",
            f"grad {values['grad_norm']:.2f}",
        ]

    def _memory_gb(self) -> float:
        """Peak of this process: of the GPU's memory, or of resident memory on CPUs."""
        if self.topology.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.topology.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
