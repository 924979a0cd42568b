"""Trains an encoder on cluster labels, or on captions.

deepspeed [--hostfile hosts] mlcd_ds/train.py --deepspeed_config ds_configs/vit_l14_8gpu.json \\
    --shards 'data/{00000..00099}.tar' --labels labels/ --model vit_l14 --output_dir run/
deepspeed [--hostfile hosts] mlcd_ds/train.py --deepspeed_config ds_configs/vit_l14_8gpu.json --objective clip \\
    --shards 'data/{00000..00099}.tar' --tokenizer clip/ --model vit_l14 --init_from run/ --lock_image --output_dir lit/
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fire
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import checkpoint, cli, collectives
from mlcd_ds.card import checkpoint_bytes, head_precisions, startup_card
from mlcd_ds.checkpoint import Checkpoint, CheckpointStore
from mlcd_ds.config import DeepSpeedDefaults, RunConfig, split_paths
from mlcd_ds.contrastive_engine import ContrastiveEngine
from mlcd_ds.data.centers import Centers, load_center_rows
from mlcd_ds.data.labels import LabelsInfo, check_label_folder
from mlcd_ds.data.loader import ImageLabelLoader, build_shard_table
from mlcd_ds.data.plan import EpochPlan
from mlcd_ds.data.shards import look_into, missing_tar
from mlcd_ds.data.tars import MissingTarError, expand_shards, shard_name
from mlcd_ds.data.tokenizer import CaptionTokenizer
from mlcd_ds.ds_config import BatchSizes, DeepSpeedSettings, load_deepspeed_config, resolve_deepspeed_config
from mlcd_ds.engine import StepResult, TrainEngine
from mlcd_ds.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceMemoryError,
    NonFiniteError,
    Preempted,
    SaveError,
    UserError,
)
from mlcd_ds.files import comes_into_sight, write_json, write_text
from mlcd_ds.machine import check_machine, needs_of
from mlcd_ds.models import flops
from mlcd_ds.models.text import ImageTextModel, TextConfig, TextTransformer, text_preset
from mlcd_ds.models.vit import Dropping, VisionTransformer, VitConfig, norm_class, preset
from mlcd_ds.monitor import Monitor, never_stopping
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.partition import ClassPartition
from mlcd_ds.profiling import StepProfiler
from mlcd_ds.progress import Progress
from mlcd_ds.run_folder import RunFolder
from mlcd_ds.schedule import RunLength, resolve_run_length
from mlcd_ds.topology import Topology, longer_waits, set_timeout_of_every_group
from mlcd_ds.watch import Watch


def train(config: RunConfig) -> None:
    """Trains an encoder: DeepSpeed's engine around it, and the class head sharded beside it; or a text tower with it.

    Start it with the launcher, `deepspeed [--hostfile hosts] mlcd_ds/train.py ...`; --dry_run needs none.
    """
    topology = Topology.from_environment()
    if config.dry_run:
        return dry_run(config, topology)
    check_launch(config, topology)
    raw = load_deepspeed_config(config.deepspeed_config)
    topology.start(longest_wait(config))
    run = RunFolder(config.output_dir)
    with watched(run, config, topology) as watch:
        train_in(run, config, raw, topology, watch)
    topology.stop()


@contextlib.contextmanager
def watched(run: RunFolder, config: RunConfig, topology: Topology) -> Iterator[Watch]:
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


def train_in(run: RunFolder, config: RunConfig, raw: dict, topology: Topology, watch: Watch) -> None:
    """The run, from its folder to its last checkpoint. raw: the DeepSpeed JSON.

    Raises Preempted, on every rank, once it has saved and stopped because a rank was asked to.
    """
    check_same_program(program(config, raw), topology)
    collectives.on_main(topology, run.open, config.resume == "auto")
    batch = BatchSizes.resolve(raw, topology.world_size, collectives.on_main(topology, run.global_batch))
    shards = collectives.on_main(topology, expand_shards, config.shards, config.allow_pipe, config.allow_missing_shards)
    table = build_shard_table(
        shards,
        config.labels_folders,
        config.num_positives,
        config.max_skipped_fraction,
        config.shard_cache,
        topology,
        config.on_captions,
        index_folder=run.path / "index",
        allow_missing=config.allow_missing_shards,
        allow_pipe=config.allow_pipe,
    )
    tokenizer = collectives.on_main(topology, load_tokenizer, config)
    order = EpochPlan(config.seed, table.counts, batch.global_batch, config.shuffle_window)
    labels, unused = table.labels_infos, table.unused()
    plan = plan_run(config, raw, batch, topology, table.num_samples, len(shards), labels, unused, tokenizer)
    if topology.is_main:
        print(plan.card, flush=True)
    collectives.on_main(topology, check_start, config, plan, run)
    check_this_machine(config, plan, topology, run)
    record = plan.record(config, table.fingerprint(), order.fingerprint())
    collectives.on_main(topology, run.write_config, record, config.allow_changed)
    check_shared(run, topology)
    run.is_ours = True

    store = CheckpointStore(run.path, topology, config.keep_last, len(table.labels_infos), config.keep_every)
    found = store.find() if config.resume == "auto" else None
    context = 0 if plan.text is None else plan.text.context
    skipped = run.path / "skipped"
    loader = ImageLabelLoader(config, table, order, plan.encoder.image_size, topology, skipped, tokenizer, context)
    engine = build_engine(config, plan, topology, tokenizer, found)
    step = 0 if found is None else resume(found, config.seed, plan, engine, loader, topology)
    monitor = open_monitor(run, engine, step, plan, topology)
    progress = Progress(
        monitor,
        topology,
        first_step=step,
        total_steps=plan.length.total_steps,
        global_batch=plan.settings.global_batch,
        samples_per_epoch=table.num_samples,
        watch=watch,
        samples_per_second_at_peak=samples_per_second_at_peak(config, plan, topology),
    )
    profiler = StepProfiler(
        config.profile_steps, run.path / "profile", topology, engine.clock, monitor, batch.global_batch
    )
    run.step = step
    bad_steps = BadSteps(config.max_bad_steps, store)
    saver = Saver(run, config, plan, store, engine, loader, monitor)
    watch.enter_loop()
    arriving = loader.iterate(step, plan.length.total_steps, ahead=1)
    batches = profiler.timing_data(progress.timing_waits(arriving))
    for images, next_images in itertools.pairwise(itertools.chain(batches, [None])):
        reported = is_due(step + 1, config.log_every_steps, plan.length) or step + 1 == 1
        histograms = is_due(step + 1, config.histogram_every_steps, plan.length)
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
        stops = result.stop_ranks > 0 and step < plan.length.total_steps
        if stops or is_due(step, config.save_every_steps, plan.length):
            watch.does("saves", step)
            with longer_waits(longest_wait(config), config.timeout_minutes):
                saved = saver.save(step)
        if stops:
            raise stopped(step, saved, watch, store)
    loader.close()
    profiler.close(step)
    if topology.is_main:
        monitor.close()
        run.status("done", step)
        print(f"done: {step} steps. Encoder: {checkpoint.find_encoder(run.path)}", flush=True)


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

    def record(self, config: RunConfig, data: str, order: str) -> dict:
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


def plan_run(
    config: RunConfig,
    raw: dict,
    batch: BatchSizes,
    topology: Topology,
    num_samples: int,
    num_shards: int,
    labels: tuple[LabelsInfo, ...],
    unused: Sequence[str] = (),
    tokenizer: CaptionTokenizer | None = None,
) -> RunPlan:
    """Resolves what the run is. raw: the DeepSpeed JSON. labels: of each head. unused: see `startup_card`. tokenizer: of a
    run on captions.

    Raises ConfigError or DataError for what does not fit together.
    """
    encoder = preset(config.model, config.image_size, config.register_tokens)
    norm_class(config.norm)  # refused here where it is absent
    text = None
    if tokenizer is not None:
        text = text_preset(config.text_model, encoder.embed_dim, tokenizer.vocabulary, tokenizer.end_token)
    length = resolve_run_length(config, samples_per_epoch=num_samples, global_batch=batch.global_batch)
    settings = resolve_deepspeed_config(
        raw,
        batch=batch,
        total_steps=length.total_steps,
        warmup_steps=length.warmup_steps,
        output_dir=config.output_dir,
        device_type=topology.device.type,
        defaults=DeepSpeedDefaults(),
    )
    num_classes = tuple(info.num_classes for info in labels)
    for classes in num_classes:
        ClassPartition(classes, topology.world_size)  # refuses more ranks than classes
    card = startup_card(
        config,
        settings,
        encoder,
        length,
        num_samples=num_samples,
        num_shards=num_shards,
        num_classes=num_classes,
        world_size=topology.world_size,
        device=topology.device.type,
        unused=unused,
        text=text,
    )
    tokenizer_hash = None if tokenizer is None else tokenizer.hash
    return RunPlan(settings, encoder, length, labels, topology.world_size, card, text, tokenizer_hash)


def load_tokenizer(config: RunConfig) -> CaptionTokenizer | None:
    """The tokenizer of a run on captions; None for one on labels."""
    return None if config.tokenizer is None else CaptionTokenizer.load(config.tokenizer)


def dry_run(config: RunConfig, topology: Topology) -> None:
    """Prints the card for --world_size ranks; reads the labels' footers only (of tars with captions, their headers), and
    starts nothing."""
    world_size = config.world_size or config.expect_world_size or topology.world_size
    if config.expect_world_size not in (None, world_size):
        raise ConfigError(f"--world_size {world_size} contradicts --expect_world_size {config.expect_world_size}")
    device = torch.device(config.device) if config.device else topology.device
    planned = Topology(0, world_size, 0, topology.local_world_size, device)
    shards = expand_shards(config.shards, config.allow_pipe, config.allow_missing_shards)
    names = [shard_name(shard) for shard in shards]
    found = [check_label_folder(folder, names, config.num_positives) for folder in config.labels_folders]
    labels, images = tuple(info for info, _ in found), max((sum(rows) for _, rows in found), default=0)
    unused: tuple[str, ...] = ()
    if config.on_captions:
        images, unused = count_images(config, shards)
    raw = load_deepspeed_config(config.deepspeed_config)
    kept = RunFolder(config.output_dir).global_batch() if config.resume == "auto" else None
    batch = BatchSizes.resolve(raw, world_size, kept)
    tokenizer = load_tokenizer(config)
    plan = plan_run(config, raw, batch, planned, images, len(shards), labels, unused, tokenizer)
    check_start(config, plan)
    if topology.is_main:
        print(plan.card)


def count_images(config: RunConfig, shards: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """(images of all tars, what to tell of those that are damaged or missing), by indexes or headers; writes none.

    Raises DataError for a missing tar without --allow_missing_shards.
    """
    count, bad = 0, []
    for shard in shards:
        found = look_into(shard, config.shard_cache, config.allow_pipe, None)
        if found.damage is not None:
            if isinstance(found.damage, MissingTarError) and not config.allow_missing_shards:
                raise missing_tar(found.damage)
            bad.append(str(found.damage))
        count += len(found.keys_before or found.index.keys)
    if not bad:
        return count, ()
    return count, (
        f"{len(bad):,} tars are damaged or missing, what no index tells of them is not counted. E.g. {bad[0]}",
    )


def check_shared(run: RunFolder, topology: Topology) -> None:
    """Refuses hosts that do not share the run folder, now rather than at the first checkpoint."""
    sees = collectives.gather_objects(comes_into_sight((run.path / "config.json").is_file), topology)
    if not all(sees):
        blind = [rank for rank, found in enumerate(sees) if not found]
        raise CheckpointError(
            f"rank(s) {blind} do not see {run.path}, which rank 0 has written: "
            "all hosts must share the file system under --output_dir. Give a folder that they share."
        )


def check_start(config: RunConfig, plan: RunPlan, run: RunFolder | None = None) -> None:
    """Refuses what a run cannot begin from: --init_from without an encoder, --centers that are not those of the labels.

    run: needs neither where it goes on from a checkpoint.
    """
    if run is not None and config.resume == "auto" and checkpoint.published(run.path / "checkpoints"):
        return
    if config.init_from is not None and not config.init_from.startswith(checkpoint.HUGGING_FACE):
        checkpoint.find_encoder(config.init_from)
    if config.centers is None:
        return
    for path, folder, info in zip(split_paths(config.centers), config.labels_folders, plan.labels, strict=True):
        centers = Centers.load(path)
        if centers.hash != info.centers_hash:  # row i must be class i
            raise DataError(
                f"--centers {path} are not the centers that the labels in {folder} were made with. Give those, or leave "
                "--centers out to start the head from random centers."
            )
        load_center_rows(centers, 0, 0, info.num_classes, plan.encoder.embed_dim)  # their shape


def check_this_machine(config: RunConfig, plan: RunPlan, topology: Topology, run: RunFolder) -> None:
    """Refuses, on every rank, a machine that one of them cannot run on; rank 0 prints what may become short."""
    classes = [info.num_classes for info in plan.labels]
    needs = needs_of(
        config,
        plan.encoder.image_size,
        plan.settings.global_batch // topology.world_size,
        topology.local_world_size,
        topology.world_size,
        checkpoint_bytes(plan.encoder, plan.settings, config, classes, plan.text),
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


def program(config: RunConfig, raw: dict) -> dict[str, str]:
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


def longest_wait(config: RunConfig) -> float:
    """Minutes that ranks wait for each other where some have much more to do than others: at the start, in saves."""
    return max(config.timeout_minutes, config.start_timeout_minutes)


def check_launch(config: RunConfig, topology: Topology) -> None:
    """Refuses a number of ranks other than the expected: a missing hostfile quietly means one machine."""
    if config.expect_world_size not in (None, topology.world_size):
        raise ConfigError(
            f"{topology.world_size} ranks were started, --expect_world_size says {config.expect_world_size}: is the "
            "hostfile there, does it name all hosts and slots?"
        )


def build_engine(
    config: RunConfig,
    plan: RunPlan,
    topology: Topology,
    tokenizer: CaptionTokenizer | None,
    found: Checkpoint | None,
) -> TrainEngine:
    """Encoder, this rank's part of each head (or the text tower), and the engine that steps them.

    found: the checkpoint that is about to be loaded, which makes --init_from and --centers superfluous.
    """
    topology.seed_torch(config.seed)
    if config.compile:
        folder = topology.use_compile_cache(config.compile_cache or Path(config.output_dir) / "compile_cache")
        if topology.is_main:
            print(f"compiled code is kept in {folder}", flush=True)
    from_scratch = found is None
    model = VisionTransformer(plan.encoder, config.seed, config.norm, dropping_of(config))
    if config.init_from is not None and from_scratch:
        adapted = checkpoint.load_weights(model, config.init_from)
        if topology.is_main:
            print("; ".join([f"encoder weights from {config.init_from}", *adapted]), flush=True)
        if config.lock_image and any("no projection" in text for text in adapted):
            raise ConfigError(
                f"--lock_image would keep a random projection: {config.init_from} has none. Give a model with one (a run, "
                "CLIP), or train without --lock_image"
            )
    if plan.text is not None:
        if config.lock_image and not from_scratch:
            checkpoint.load_weights(model, found.path)  # the engine restores what is trained
        text = TextTransformer(plan.text, seed=config.seed + 1)
        both = ImageTextModel(model, text, config.lock_image)
        return ContrastiveEngine(both, tokenizer, plan.settings, config, topology, longest_wait(config))
    heads = [build_head(config, plan, topology, from_scratch, index) for index in range(len(plan.labels))]
    return TrainEngine(model, heads, plan.settings, config, topology, longest_wait(config), config)


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


def build_head(config: RunConfig, plan: RunPlan, topology: Topology, from_scratch: bool, index: int) -> PartialFC:
    """This rank's part of the `index`-th head; its own seed, so that two heads of one size differ."""
    num_classes = plan.labels[index].num_classes
    partition = ClassPartition(num_classes, topology.world_size)
    rows = partition.start(topology.rank), partition.stop(topology.rank)
    centers = None
    if config.centers is not None and from_scratch:
        own = Centers.load(split_paths(config.centers)[index])
        centers = load_center_rows(own, *rows, num_classes, plan.encoder.embed_dim)
    options = {name: getattr(config, name) for name in PartialFC.SETTINGS}
    precision, gather_precision = head_precisions(config, plan.settings, topology.device.type)
    options |= {"precision": precision, "gather_precision": gather_precision, "init_centers": centers}
    options |= {"kernels": config.head_kernels}
    return PartialFC(num_classes, plan.encoder.embed_dim, topology, seed=config.seed + index, **options)


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
    """Rank 0's monitor; the others have none."""
    if not topology.is_main:
        return None
    return Monitor(run.path, engine.monitor_events, engine.tensorboard, step, step * plan.settings.global_batch)


class BadSteps:
    """Counts the skipped steps in a row, tells each, and ends the run above `limit`. Every rank has its own, all alike."""

    def __init__(self, limit: int, store: CheckpointStore):
        self.limit, self.store = limit, store
        self.in_a_row = 0

    def judge(self, step: int, result: StepResult) -> None:
        """step: finished steps. Raises NonFiniteError, on every rank, after `limit` skipped steps in a row."""
        if result.applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        norms = ", ".join(f"{norm:g}" for norm in result.head_grad_norms)
        what = (
            f"loss {result.loss:g}, norm of the encoder's gradient {result.grad_norm:g}, of the centers' {norms}; the "
            f"{result.bad} of rank(s) {list(result.bad_ranks)} are not finite"
        )
        if self.store.topology.is_main:
            print(f"WARNING: step {step} was skipped, nothing has moved ({self.in_a_row} in a row): {what}", flush=True)
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row, up to step {step}, were skipped (--max_bad_steps {self.limit}): {what}. "
                f"The last good checkpoint is {self.store.newest()}. Go on from it (--resume auto) with a lower learning "
                "rate, or look at the images of these steps."
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

    def save(self, step: int) -> bool:
        """Writes and publishes the checkpoint of `step`: False where the disk did not let it, on every rank.

        Raises SaveError after --max_failed_saves in a row, NonFiniteError where a weight is no number.
        """
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
                    f"{newest}. The run goes on, and stops after {self.config.max_failed_saves} failed saves in a row: "
                    "make room on the disk.",
                    flush=True,
                )
            if self.failed >= self.config.max_failed_saves:
                raise SaveError(
                    f"{self.failed} saves in a row have failed (--max_failed_saves), the last at step {step}: {error}. The "
                    f"last good checkpoint is {newest}. Make room or mend the disk, then --resume auto."
                ) from error
            return False
        self.failed = 0
        if is_main:
            seconds = time.monotonic() - started
            megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
            print(
                f"saved {path.name}: {seconds:.1f} s, {megabytes:,.1f} MB, {megabytes / seconds:,.0f} MB/s", flush=True
            )
            note = never_stopping(self.run.status, "status.json")
            note("running", step)
        return True

    def _write(self, folder: Path, step: int, totals: dict) -> None:
        """This rank's parts. Raises OSError, on this rank alone."""
        self.engine.save(folder, self.config.model)
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
    newest = store.newest()
    kept = f"saved as {newest}" if saved else f"NOT saved, the last good checkpoint is {newest}"
    return Preempted(f"after step {step}, on rank {rank}: {reason}; {kept}. --resume auto goes on from there")


def is_due(step: int, every: int, length: RunLength) -> bool:
    """Whether the `step`-th step is one of every `every`, or the last."""
    return step % every == 0 or step == length.total_steps


if __name__ == "__main__":
    cli.run(fire.Fire, train, RunConfig)
