"""What train.py and finetune.py share: the start on many ranks, the loop over the steps, checkpoints, how a run ends."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mlcd_ds import checkpoint, collectives
from mlcd_ds.checkpoint import Checkpoint, CheckpointStore
from mlcd_ds.config import RunConfig, RunSettings
from mlcd_ds.data.labels import LabelsInfo
from mlcd_ds.data.loader import ImageLabelLoader
from mlcd_ds.ds_config import DeepSpeedSettings
from mlcd_ds.engine import StepResult, TrainEngine
from mlcd_ds.errors import (
    CheckpointError,
    ConfigError,
    DeviceMemoryError,
    NonFiniteError,
    Preempted,
    SaveError,
    UserError,
)
from mlcd_ds.files import comes_into_sight, write_json, write_text
from mlcd_ds.machine import check_machine, needs_of
from mlcd_ds.models import flops
from mlcd_ds.models.text import TextConfig
from mlcd_ds.models.vit import Dropping, VitConfig
from mlcd_ds.monitor import Monitor, never_stopping
from mlcd_ds.profiling import StepProfiler
from mlcd_ds.progress import Progress
from mlcd_ds.run_folder import RunFolder, writing_the_run
from mlcd_ds.schedule import RunLength
from mlcd_ds.topology import Topology, longer_waits, set_timeout_of_every_group
from mlcd_ds.watch import Watch


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that follows from flags, JSON and data before anything is built.

    labels: of each head. text, tokenizer_hash: of a run on captions, which has no heads.
    """

    settings: DeepSpeedSettings
    encoder: VitConfig
    length: RunLength
    labels: tuple[LabelsInfo, ...]
    world_size: int
    card: str
    text: TextConfig | None = None
    tokenizer_hash: str | None = None

    def record(self, config: RunSettings, data: str, order: str) -> dict:
        """What config.json holds. data, order: fingerprints of the samples and of their order."""
        facts = {
            **{name: self._of_labels(name) for name in ("num_classes", "centers_hash", "feature_model")},
            "data": data,
            "order": order,
            "global_batch": self.settings.global_batch,
            "total_steps": self.length.total_steps,
            "world_size": self.world_size,
            "zero_stage": self.settings.zero_stage,
            "precision": self.settings.precision,
            **({} if self.text is None else {"tokenizer_hash": self.tokenizer_hash}),
        }
        return {
            "settings": config.model_dump(),
            "facts": facts,
            "encoder": self.encoder.model_dump(),
            **({} if self.text is None else {"text": self.text.model_dump()}),
            "deepspeed": self.settings.json,
            "torch": torch.__version__,
        }

    def _of_labels(self, name: str):
        """A field of the labels; a list, one for each head, where there are several; None where there is none."""
        values = [getattr(info, name) for info in self.labels]
        return values if len(values) > 1 else next(iter(values), None)


@contextlib.contextmanager
def watched(run: RunFolder, config: RunSettings, topology: Topology) -> Iterator[Watch]:
    """The watch over a run, which is within it; what ends the run is written to its folder and raised again."""
    with Watch(topology, config.timeout_minutes, config.warn_data_wait_seconds, run.ended_at_once) as watch:
        try:
            with watch.naming_peers(), naming_memory_settings(run):
                yield watch
        except Preempted as stop:
            watch.stop_beating()
            if topology.is_main or not watch.in_loop:
                run.fail(stop, topology.rank)
            raise
        except Exception as error:
            watch.stop_beating()
            run.fail(error, topology.rank)
            raise


@contextlib.contextmanager
def naming_memory_settings(run: RunFolder) -> Iterator[None]:
    """Turns a GPU's lack of memory within it into a DeviceMemoryError that names what takes memory. Nothing is retried."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"after step {run.step} the GPU's memory did not suffice ({str(error).splitlines()[0]}). The card at the start "
            'says what takes how much. Lower "train_micro_batch_size_per_gpu", add "activation_checkpointing": {}, raise '
            '"zero_optimization.stage" in the DeepSpeed JSON, or lower --sample_rate or --workspace_mb; then --resume auto.'
        ) from error


def check_shared(run: RunFolder, topology: Topology) -> None:
    """Refuses hosts that do not share the run folder, now rather than at the first checkpoint."""
    sees = collectives.gather_objects(comes_into_sight((run.path / "config.json").is_file), topology)
    if not all(sees):
        blind = [rank for rank, found in enumerate(sees) if not found]
        raise CheckpointError(
            f"rank(s) {blind} do not see {run.path}, which rank 0 has written: "
            "all hosts must share the file system under --output_dir. Give a folder that they share."
        )


def check_this_machine(
    config: RunConfig, plan: RunPlan, topology: Topology, run: RunFolder, checkpoint_bytes: int
) -> None:
    """Refuses, on every rank, a machine that one of them cannot run on; rank 0 prints what may become short.

    checkpoint_bytes: of one, see `memory.checkpoint_bytes`.
    """
    needs = needs_of(
        config,
        plan.encoder.image_size,
        plan.settings.global_batch // topology.world_size,
        topology.local_world_size,
        topology.world_size,
        checkpoint_bytes,
        plan.length.total_steps,
    )
    problem, warnings = None, []
    try:
        warnings = check_machine(needs, run.path)
    except UserError as error:
        problem = error
    found = collectives.gather_objects((problem, warnings), topology)
    for error, _ in found:
        if error is not None:
            raise error
    if topology.is_main:
        for text in sorted({text for _, own in found for text in own}):
            print(f"WARNING: {text}", flush=True)


def program(config: RunSettings, raw: dict) -> dict[str, str]:
    """What must be the same on every host: this program's files, the libraries' versions, flags and DeepSpeed JSON."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "numpy", "pillow", "simplejpeg")
    }
    flags = {f"--{name}": repr(value) for name, value in config.model_dump().items()}
    return {
        "files of mlcd_ds": digest.hexdigest()[:12],
        **versions,
        **flags,
        "DeepSpeed JSON": json.dumps(raw, sort_keys=True),
    }


def check_same_program(own: dict[str, str], topology: Topology) -> None:
    """Refuses ranks that would compute with different code, versions or settings. One gather of a few kB."""
    found = collectives.gather_objects(own, topology)
    for rank, other in enumerate(found):
        if other != found[0]:
            differing = [
                f"{name} {found[0].get(name)} on rank 0, {value} on rank {rank}"
                for name, value in other.items()
                if found[0].get(name) != value
            ]
            raise ConfigError(
                f"rank {rank} runs another program than rank 0: {'; '.join(differing)[:500]}. Give all hosts the same "
                "installation and the same command."
            )


def longest_wait(config: RunSettings) -> float:
    """Minutes that ranks wait for each other where some have much more to do than others: at the start, in saves."""
    return max(config.timeout_minutes, config.start_timeout_minutes)


def check_launch(config: RunSettings, topology: Topology) -> None:
    """Refuses a number of ranks other than the expected: a missing hostfile quietly means one machine."""
    if config.expect_world_size not in (None, topology.world_size):
        raise ConfigError(
            f"{topology.world_size} ranks were started, --expect_world_size says {config.expect_world_size}: is the "
            "hostfile there, does it name all hosts and slots?"
        )


def dropping_of(config: RunConfig) -> Dropping:
    """What the image encoder leaves out at random."""
    return Dropping(config.seed, config.drop_path, config.patch_dropout)


def samples_per_second_at_peak(config: RunConfig, plan: RunPlan, topology: Topology) -> float:
    """Images a second at which MFU is 1: all ranks' matrix product rate over the towers' FLOPs of an image.

    The rate is --peak_tflops, else that of a large product in the run's precision, measured on all ranks at once. Of a
    locked image tower the forward pass counts. The heads' products do not: theirs is another use of the time.
    """
    image = flops.total(plan.encoder, dropping_of(config))
    work = image.forward if config.lock_image else image.flops
    if plan.text is not None:
        work += flops.text_total(plan.text).flops
    if config.peak_tflops is not None:
        rate, how = config.peak_tflops * 1e12 * topology.world_size, "--peak_tflops"
    else:
        collectives.barrier(topology)
        own = flops.measured_matmul_rate(topology.device, getattr(torch, plan.settings.precision))
        rate = collectives.sum_(torch.tensor([own], dtype=torch.float64, device=topology.device), topology).item()
        how = f"a large {plan.settings.precision} product, measured"
    if topology.is_main:
        print(
            f"MFU is the share of {rate / topology.world_size / 1e12:,.3g} TFLOP/s a rank ({how}); an image takes "
            f"{work / 1e9:,.4g} GFLOP forward and backward",
            flush=True,
        )
    return rate / work


def run_steps(
    run: RunFolder,
    config: RunConfig,
    plan: RunPlan,
    topology: Topology,
    watch: Watch,
    *,
    engine: TrainEngine,
    loader: ImageLabelLoader,
    store: CheckpointStore,
    found: Checkpoint | None,
    samples_per_epoch: int,
    histogram_every: int | None = None,
    telling: type[Progress] = Progress,
    after_step: Callable[[int, Monitor | None], None] = lambda step, monitor: None,
) -> None:
    """The steps of a run, from the first or from those that checkpoint `found` has, to its last checkpoint.

    histogram_every: steps between histograms; None: there are none. telling: what tells of the steps. after_step: called by
    every rank after each step, before its checkpoint, unless the run is about to stop; with the steps finished, and rank
    0's monitor.

    Raises Preempted, on every rank, once it has saved and stopped because a rank was asked to.
    """
    step = 0 if found is None else resume(found, config.seed, plan, engine, loader, topology)
    global_batch, total_steps = plan.settings.global_batch, plan.length.total_steps
    monitor = open_monitor(run, engine, step, plan, topology)
    progress = telling(
        monitor,
        topology,
        first_step=step,
        total_steps=total_steps,
        global_batch=global_batch,
        samples_per_epoch=samples_per_epoch,
        watch=watch,
        samples_per_second_at_peak=samples_per_second_at_peak(config, plan, topology),
    )
    profiler = StepProfiler(config.profile_steps, run.path / "profile", topology, engine.clock, monitor, global_batch)
    run.step = run.saved = step
    bad_steps = BadSteps(config.max_bad_steps, config.max_bad_steps_of_1000, store)
    saver = Saver(run, config, plan, store, engine, loader, monitor)
    watch.enter_loop()
    arriving = loader.iterate(step, total_steps, ahead=1)
    batches = profiler.timing_data(progress.timing_waits(arriving))
    for images, next_images in itertools.pairwise(itertools.chain(batches, [None])):
        reported = is_due(step + 1, config.log_every_steps, plan.length) or step + 1 == 1
        histograms = histogram_every is not None and is_due(step + 1, histogram_every, plan.length)
        watch.does("computes", step)
        profiler.before_step(step + 1)
        result = engine.train_step(
            images,
            step,
            collect_stats=reported or histograms,
            next_batch=next_images,
            stop_wanted=watch.stop_wanted,
        )
        if step == progress.first_step:  # compilers and first reads are behind all ranks
            set_timeout_of_every_group(config.timeout_minutes)
        step = run.step = step + 1
        bad_steps.judge(step, result)
        if reported or histograms:
            progress.report(step, images, result, loader, engine.skipped_steps, histograms)
        stops = result.stop_ranks > 0 and step < total_steps
        if not stops:
            after_step(step, monitor)
        if stops or is_due(step, config.save_every_steps, plan.length):
            watch.does("saves", step)
            with longer_waits(longest_wait(config), config.timeout_minutes):
                saved = saver.save_last(step) if step == total_steps else saver.save(step)
        if stops:
            raise stopped(step, saved, watch, store)
    loader.close()
    profiler.close(step)
    if topology.is_main:
        monitor.close()
        with writing_the_run(f"{run.path / 'status.json'}, though the last step is saved,"):
            run.status("done", step)
        print(f"done: {step} steps. Encoder: {checkpoint.find_encoder(run.path)}", flush=True)


def resume(
    found: Checkpoint, seed: int, plan: RunPlan, engine: TrainEngine, loader: ImageLabelLoader, topology: Topology
) -> int:
    """Loads a checkpoint, the ledger of its samples included; the step to go on from."""
    totals = checkpoint.read_ledger(found.path)
    engine.load(found, seed)
    engine.skipped_steps = found.state["skipped_steps"]
    if totals is not None:
        loader.go_on_from(totals)
    elif topology.is_main:
        print(
            f"WARNING: {found.path} has no {checkpoint.LEDGER}, an earlier version has written it: the sums of samples "
            f"decoded and skipped count from step {found.step} on, not from the start of the run.",
            flush=True,
        )
    if topology.is_main:
        ranks = found.state["world_size"]
        by = "" if ranks == topology.world_size else f", written by {ranks} ranks, on {topology.world_size}"
        print(f"resumed from {found.path} at step {found.step}/{plan.length.total_steps}{by}", flush=True)
    return found.step


def open_monitor(run: RunFolder, engine: TrainEngine, step: int, plan: RunPlan, topology: Topology) -> Monitor | None:
    """Rank 0's monitor; the others have none. Raises SaveError, on every rank, where its file cannot be begun."""
    monitor = None

    def begin() -> None:
        nonlocal monitor
        with writing_the_run(run.path / "metrics.jsonl"):
            samples = step * plan.settings.global_batch
            monitor = Monitor(run.path, engine.monitor_events, engine.tensorboard, step, samples)

    collectives.on_main(topology, begin)
    return monitor


BAD_STEPS_WINDOW = 1000
"""Steps."""


class BadSteps:
    """Counts the skipped steps, tells each, and ends the run at `limit` in a row, or above `limit_of_late` in a window.

    Every rank has its own, all alike. Counts begin anew at each start of the run.
    """

    def __init__(self, limit: int, limit_of_late: int, store: CheckpointStore):
        self.limit, self.limit_of_late, self.store = limit, limit_of_late, store
        self.in_a_row = 0
        self.late: deque[int] = deque()

    def judge(self, step: int, result: StepResult) -> None:
        """step: finished steps. Raises NonFiniteError, on every rank, where too many were skipped."""
        while self.late and self.late[0] <= step - BAD_STEPS_WINDOW:
            self.late.popleft()
        if result.applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.late.append(step)
        norms = ", ".join(f"{norm:g}" for norm in result.head_grad_norms)
        what = (
            f"loss {result.loss:g}, norm of the encoder's gradient {result.grad_norm:g}, of the centers' {norms}; the "
            f"{result.bad} of rank(s) {list(result.bad_ranks)} are not finite"
        )
        if self.store.topology.is_main:
            print(f"WARNING: step {step} was skipped, nothing has moved ({self.in_a_row} in a row): {what}", flush=True)
        count = ""
        if self.in_a_row >= self.limit:
            count = f"{self.in_a_row} steps in a row, up to step {step}, were skipped (--max_bad_steps {self.limit})"
        elif len(self.late) > self.limit_of_late:
            count = (
                f"{len(self.late)} of the last {BAD_STEPS_WINDOW} steps, up to step {step}, were skipped "
                f"(--max_bad_steps_of_1000 {self.limit_of_late})"
            )
        if count:
            raise NonFiniteError(
                f"{count}: {what}. The last good checkpoint is {self.store.newest()}. Go on from it (--resume auto) with a "
                "lower learning rate, or look at the images of these steps."
            )


class Saver:
    """Writes and publishes the run's checkpoints; every rank calls it. A save that fails is told and survived, for a while.

    monitor: rank 0's, else None.
    """

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        plan: RunPlan,
        store: CheckpointStore,
        engine: TrainEngine,
        loader: ImageLabelLoader,
        monitor: Monitor | None,
    ):
        self.run, self.config, self.plan = run, config, plan
        self.store, self.engine, self.loader, self.monitor = store, engine, loader, monitor
        self.failed = 0
        """Saves in a row that could not be written."""

    def save_last(self, step: int) -> bool:
        """`save` of the last step, which no later one makes up for: tried twice. True.

        Raises SaveError where neither try could be written: the run is not done.
        """
        if self.save(step, "It is tried once more") or self.save(step, "The run ends without it"):
            return True
        raise SaveError(
            f"the last step, {step}, could not be saved (twice, see above): the run is not done. The last good checkpoint "
            f"is {self.store.newest()}. Make room or mend the disk, then --resume auto, which does the steps after it again."
        )

    def save(self, step: int, then: str = "") -> bool:
        """Writes and publishes the checkpoint of `step`: False where the disk did not let it, on every rank.

        then: what comes after a failed save, for people. Raises SaveError after --max_failed_saves in a row, NonFiniteError
        where a weight is no number.
        """
        then = then or f"The run goes on, and stops after {self.config.max_failed_saves} failed saves in a row"
        self._refuse_bad_weights(step)
        started = time.monotonic()
        is_main = self.store.topology.is_main
        totals = self.loader.totals()
        try:
            path = self.store.write(step, lambda folder: self._write(folder, step, totals))
        except SaveError as error:
            self.failed += 1
            newest = self.store.newest()
            if is_main:
                print(
                    f"WARNING: CHECKPOINT NOT SAVED at step {step} ({self.failed} in a row): {error}. The last good one is "
                    f"{newest}. {then}: make room on the disk.",
                    flush=True,
                )
            if self.failed >= self.config.max_failed_saves:
                raise SaveError(
                    f"{self.failed} saves in a row have failed (--max_failed_saves), the last at step {step}: {error}. The "
                    f"last good checkpoint is {newest}. Make room or mend the disk, then --resume auto."
                ) from error
            return False
        self.failed, self.run.saved = 0, step
        if is_main:
            seconds = time.monotonic() - started
            megabytes = self.store.bytes_published / 1e6
            print(
                f"saved {path.name}: {seconds:.1f} s, {megabytes:,.1f} MB, {megabytes / seconds:,.0f} MB/s", flush=True
            )
            note = never_stopping(self.run.status, "status.json")
            note("running", step)
        return True

    def _write(self, folder: Path, step: int, totals: dict) -> list[Path]:
        """This rank's parts. Raises OSError, on this rank alone."""
        written = self.engine.save(folder, self.config.model)
        if self.monitor is not None:
            self.monitor.sync()
            state = {
                "step": step,
                "samples": step * self.plan.settings.global_batch,
                "world_size": self.plan.world_size,
                "zero_stage": self.plan.settings.zero_stage,
                "skipped_steps": self.engine.skipped_steps,
            }
            write_json(folder / "state.json", state)
            write_text(folder / checkpoint.LEDGER, json.dumps(totals) + "\n")
        return written

    def _refuse_bad_weights(self, step: int) -> None:
        found = collectives.gather_objects(self.engine.not_finite(), self.store.topology)
        bad = {rank: name for rank, name in enumerate(found) if name}
        if bad:
            raise NonFiniteError(
                f"after step {step} weights are not finite on rank(s) {list(bad)} ({next(iter(bad.values()))}): not saved. "
                f"The last good checkpoint is {self.store.newest()}. Go on from it with a lower learning rate."
            )


def stopped(step: int, saved: bool, watch: Watch, store: CheckpointStore) -> Preempted:
    """What every rank ends with once all have agreed to stop after `step`."""
    reasons = collectives.gather_objects(watch.stop_reason, store.topology)
    rank, reason = next((rank, text) for rank, text in enumerate(reasons) if text)
    last = collectives.on_main(store.topology, checkpoint.published, store.folder)[-1:]
    if saved:
        kept = f"saved as {last[0]}. --resume auto goes on from there"
    elif last:
        kept = (
            f"NOT SAVED, for the disk did not let it (see above). Make room, then --resume auto: it goes on from step "
            f"{checkpoint.step_of(last[0])}, {last[0]}, and does the steps after it again"
        )
    else:
        kept = (
            "NOT SAVED, for the disk did not let it (see above), nor was any step before: make room, then start again"
        )
    return Preempted(f"after step {step}, on rank {rank}: {reason}; {kept}")


def is_due(step: int, every: int, length: RunLength) -> bool:
    """Whether the `step`-th step is one of every `every`, or the last."""
    return step % every == 0 or step == length.total_steps
