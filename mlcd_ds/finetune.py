"""Fine-tunes an encoder on images of one class each, through the engine, data plan and checkpoints of the training.

The classes of the tars (KEY.cls, or the list of KEY.json) become label shards in RUN/class_labels, so that order,
augmentation, resuming and the ledger of skipped images are those of train.py. After each epoch the test images are
classified.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mlcd_ds import checkpoint, collectives
from mlcd_ds.checkpoint import CheckpointStore
from mlcd_ds.clustering.features import batches_of_images
from mlcd_ds.config import DeepSpeedDefaults, FinetuneConfig, RunConfig, RunSettings
from mlcd_ds.data.labels import LabelsInfo, label_path, write_label_shard
from mlcd_ds.data.loader import ImageLabelLoader, build_shard_table
from mlcd_ds.data.plan import EpochPlan
from mlcd_ds.data.tars import IMAGE_EXTENSIONS, expand_shards, index_tar, local_shard, read_samples, shard_name
from mlcd_ds.ds_config import BatchSizes, load_deepspeed_config, resolve_deepspeed_config
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.features import CLASS_EXTENSIONS, labels_of_shard, true_classes
from mlcd_ds.evaluation.metrics import top_k_accuracy
from mlcd_ds.evaluation.results import Result, write_result
from mlcd_ds.finetune_engine import FinetuneEngine
from mlcd_ds.memory import checkpoint_bytes, count_parameters
from mlcd_ds.models.classifier import Classifier
from mlcd_ds.models.vit import Dropping, VisionTransformer, VitConfig
from mlcd_ds.monitor import Monitor
from mlcd_ds.progress import Progress
from mlcd_ds.run_folder import RunFolder
from mlcd_ds.run_loop import (
    RunPlan,
    check_launch,
    check_same_program,
    check_shared,
    check_this_machine,
    longest_wait,
    program,
    run_steps,
    watched,
)
from mlcd_ds.schedule import resolve_run_length
from mlcd_ds.topology import Topology, longer_waits
from mlcd_ds.watch import Watch

CLASS_LABELS, RESULTS = "class_labels", "results"
"""Folders of the run."""


def finetune(config: FinetuneConfig) -> None:
    """Fine-tunes an encoder with a classifier on it, and reports top-1 and top-5 on the test images after each epoch.

    Start it with the launcher, `deepspeed [--hostfile hosts] tools/finetune.py ...`.
    """
    topology = Topology.from_environment()
    check_launch(config, topology)
    raw = load_deepspeed_config(config.deepspeed_config)
    topology.start(longest_wait(config))
    run = RunFolder(config.output_dir)
    with watched(run, config, topology) as watch:
        _finetune_in(run, config, raw, topology, watch)
    topology.stop()


def as_run_config(config: FinetuneConfig, model_name: str) -> RunConfig:
    """The settings that training's loader, engine and checkpoints read: one label an image, the class."""
    shared = {name: getattr(config, name) for name in RunSettings.model_fields}
    labels = str(Path(config.output_dir) / CLASS_LABELS)
    own = {"labels": labels, "model": model_name, "drop_path": config.drop_path}
    return RunConfig(objective="cd", num_positives=1, **own, **shared)


def _finetune_in(run: RunFolder, config: FinetuneConfig, raw: dict, topology: Topology, watch: Watch) -> None:
    check_same_program(program(config, raw), topology)
    collectives.on_main(topology, run.open, config.resume == "auto")
    batch = BatchSizes.resolve(raw, topology.world_size, collectives.on_main(topology, run.global_batch))
    encoder, name = load_encoder(config)
    shared = as_run_config(config, name)
    shards = collectives.on_main(topology, expand_shards, config.shards, config.allow_pipe)
    test_shards = collectives.on_main(topology, expand_shards, config.test_shards, config.allow_pipe)
    test = TestImages(config, test_shards, topology)
    num_classes = make_class_labels(config, shards, run.path / CLASS_LABELS, topology)
    collectives.barrier(topology)
    table = build_shard_table(
        shards,
        shared.labels_folders,
        1,
        config.max_skipped_fraction,
        config.shard_cache,
        topology,
        index_folder=run.path / "index",
        allow_pipe=config.allow_pipe,
    )
    order = EpochPlan(config.seed, table.counts, batch.global_batch, config.shuffle_window)
    plan = plan_finetuning(config, shared, raw, batch, encoder.config, topology, table.num_samples, num_classes)
    if topology.is_main:
        print("\n".join([plan.card, *(f"  - {text}" for text in table.unused())]), flush=True)
    check_this_machine(shared, plan, topology, run, _checkpoint_bytes(config, shared, plan, num_classes))
    record = plan.record(config, table.fingerprint(), table.order(order.fingerprint()))
    collectives.on_main(topology, run.write_config, record, config.allow_changed)
    check_shared(run, topology)
    run.is_ours = True

    store = CheckpointStore(run.path, topology, config.keep_last, heads=0, keep_every=config.keep_every)
    found = store.find() if config.resume == "auto" else None
    loader = ImageLabelLoader(shared, table, order, encoder.config.image_size, topology, run.path / "skipped")
    topology.seed_torch(config.seed)
    model = Classifier(encoder, num_classes, config.seed)
    engine = FinetuneEngine(model, plan.settings, config, shared, topology, longest_wait(config))

    def evaluate_after_epoch(step: int, monitor: Monitor | None) -> None:
        if not ends_epoch(step, plan, table.num_samples):
            return
        watch.does("evaluates", step)
        with longer_waits(longest_wait(config), config.timeout_minutes):
            metrics_of = {"": test.evaluate(engine, engine.logits)}
            if (averaged := engine.averaged()) is not None:
                metrics_of[checkpoint.AVERAGE] = test.evaluate(engine, partial(_logits, averaged, topology.device))
        if topology.is_main:
            samples = step * plan.settings.global_batch
            epoch = samples / table.num_samples
            curves = {
                f"test_{name}_{weights}".removesuffix("_"): value
                for weights, metrics in metrics_of.items()
                for name, value in metrics.items()
            }
            monitor.scalars(step, samples, curves)
            for weights, metrics in metrics_of.items():
                path = save_result(run, config, name, plan, step, epoch, metrics, test, weights)
                shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not math.isnan(value))
                of = " of the averaged weights" if weights else ""
                print(f"epoch {epoch:.2f}: {shown}{of} on {test.count} test images; {path}", flush=True)

    run_steps(
        run,
        shared,
        plan,
        topology,
        watch,
        engine=engine,
        loader=loader,
        store=store,
        found=found,
        samples_per_epoch=table.num_samples,
        telling=FinetuneProgress,
        after_step=evaluate_after_epoch,
    )


def _checkpoint_bytes(config: FinetuneConfig, shared: RunConfig, plan: RunPlan, num_classes: int) -> int:
    """About how large a checkpoint is: the encoder's, and as many bytes for each of the classifier's weights."""
    encoder = checkpoint_bytes(plan.encoder, plan.settings, shared, num_classes=())
    of_encoder, of_classifier = count_parameters(plan.encoder), num_classes * (plan.encoder.width + 1)
    averaged = 4 * (of_encoder + of_classifier) if config.ema_decay else 0
    return round(encoder * (1 + of_classifier / of_encoder)) + averaged


@torch.no_grad()
def _logits(model: Classifier, device: torch.device, images_b3HH: torch.Tensor) -> torch.Tensor:
    return model(images_b3HH.to(device)).float()


def load_encoder(config: FinetuneConfig) -> tuple[VisionTransformer, str]:
    """(the encoder of --init_from at --image_size, the name of its architecture). Raises ConfigError for another multiple
    than of its patches."""
    encoder = checkpoint.load_encoder(config.init_from)
    name = Path(config.init_from.removeprefix(checkpoint.HUGGING_FACE)).name
    if not config.init_from.startswith(checkpoint.HUGGING_FACE):
        name = checkpoint.encoder_name(config.init_from)
    dropping = Dropping(config.seed, config.drop_path)
    if config.image_size in (None, encoder.config.image_size) and not dropping.is_on:
        return encoder.train(), name
    size = config.image_size or encoder.config.image_size
    try:
        resized = VitConfig(**encoder.config.model_dump() | {"image_size": size})
    except ValueError:
        raise ConfigError(
            f"--image_size {config.image_size} is no multiple of the encoder's patches of {encoder.config.patch_size} pixels"
        ) from None
    model = VisionTransformer(resized, config.seed, dropping=dropping)
    checkpoint.fit_weights(model, encoder.state_dict(), config.init_from)
    return model.train(), name


def make_class_labels(config: FinetuneConfig, shards: list[str], folder: Path, topology: Topology) -> int:
    """Writes a label shard per tar with the class of each image, each rank its share; the number of classes.

    Raises DataError for an image without one class, or with one that is not below --num_classes.
    """
    found = {}

    def read_own() -> int:
        largest = -1
        for shard in shards[topology.rank :: topology.world_size]:
            path = local_shard(shard, config.shard_cache, config.allow_pipe)
            classes = labels_of_shard(path, config.classes_key)
            wrong = next((key for key, own in classes.items() if len(own) != 1), None)
            if wrong is not None:
                raise DataError(
                    f"{path}: image {wrong} has the classes {list(classes[wrong])}: fine-tuning wants one an image"
                )
            found[shard] = classes
            largest = max([largest, *(own[0] for own in classes.values())])
        return largest

    largest = max(collectives.all_for_long(topology, read_own))
    num_classes = largest + 1 if config.num_classes is None else config.num_classes
    if largest >= num_classes:
        raise DataError(f"an image of {config.shards} is of class {largest}, --num_classes is {num_classes}: raise it")
    info = LabelsInfo(num_classes, 1, "classes", f"{config.classes_key} of KEY.json, or KEY.cls")
    for shard, classes in found.items():
        rows = np.array([own[0] for own in classes.values()], np.int32).reshape(-1, 1)
        write_label_shard(
            label_path(folder, shard_name(shard)), list(classes), rows, np.zeros(rows.shape, np.float16), info
        )
    return num_classes


def plan_finetuning(
    config: FinetuneConfig,
    shared: RunConfig,
    raw: dict,
    batch: BatchSizes,
    encoder: VitConfig,
    topology: Topology,
    num_samples: int,
    num_classes: int,
) -> RunPlan:
    """Resolves what the run is. Raises ConfigError for what does not fit together."""
    length = resolve_run_length(shared, samples_per_epoch=num_samples, global_batch=batch.global_batch)
    settings = resolve_deepspeed_config(
        raw,
        batch=batch,
        total_steps=length.total_steps,
        warmup_steps=length.warmup_steps,
        output_dir=config.output_dir,
        device_type=topology.device.type,
        defaults=DeepSpeedDefaults(),
    )
    schedule = settings.json.get("scheduler", {}).get("type")
    if config.layer_decay < 1 and schedule not in (None, "WarmupCosineLR"):
        raise ConfigError(
            f"the DeepSpeed JSON's scheduler {schedule} gives all layers one learning rate: take WarmupCosineLR, "
            f"which scales "
            "each layer's own, or --layer_decay 1"
        )
    mixing = ", ".join(f"{name} {getattr(config, name):g}" for name in ("mixup", "cutmix", "label_smoothing"))
    lowest = config.layer_decay ** (encoder.layers + 1)
    rows = (
        ("fine-tuning", f"{config.init_from}, {shared.model} at {encoder.image_size} px, {num_classes:,} classes"),
        (
            "ranks",
            f"{topology.world_size} on {topology.device.type}, {settings.precision}, ZeRO stage {settings.zero_stage}",
        ),
        (
            "global batch",
            f"{settings.global_batch:,} images = {settings.micro_batch} a micro-batch x {settings.accumulation} "
            f"accumulated x "
            f"{topology.world_size} ranks",
        ),
        ("length", f"{length.total_steps:,} steps = {length.epochs:.4g} epochs of {num_samples:,} images"),
        (
            "learning rate",
            f"{settings.learning_rate:g} for the classifier, x {config.layer_decay:g} a block down to x {lowest:.3g}; "
            f"{length.warmup_steps:,} steps of warm-up",
        ),
        ("targets", mixing),
        *([("drop path", f"{config.drop_path:g} in the last block, 0 in the first")] if config.drop_path else []),
        *([("average", _average_line(config.ema_decay, length.total_steps))] if config.ema_decay else []),
    )
    lines = [f"  {name:<13}  {text}" for name, text in rows]
    notes = [f"  - {note}" for note in (*settings.notes, *length.notes)]
    card = "\n".join(["mlcd_ds", *lines, "why:", *notes])
    info = LabelsInfo(num_classes, 1, "classes", CLASS_LABELS)
    return RunPlan(settings, encoder, length, (info,), topology.world_size, card)


def _average_line(decay: float, steps: int) -> str:
    return (
        f"of the weights, {decay:g} of it kept at each step: the last {1 / (1 - decay):,.0f} steps make most of it; at the "
        f"end {decay**steps:.1%} are the weights that the run began with"
    )


def ends_epoch(step: int, plan: RunPlan, num_samples: int) -> bool:
    """Whether the `step`-th step is the first that has seen another whole epoch, or the last."""
    before, after = ((step - back) * plan.settings.global_batch // num_samples for back in (1, 0))
    return after > before or step == plan.length.total_steps


class TestImages:
    """The test images, every W-th on each rank. count: usable ones, once evaluated. skipped: {reason: images} of this
    rank.
    """

    __test__ = False  # no test, whatever pytest makes of its name

    def __init__(self, config: FinetuneConfig, shards: list[str], topology: Topology):
        self.config, self.topology = config, topology
        self.shards = [local_shard(shard, config.shard_cache, config.allow_pipe) for shard in shards]
        self.total = sum(len(index_tar(shard).keys) for shard in self.shards)
        self.count, self.skipped = 0, Counter()

    def _own(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        samples = itertools.chain.from_iterable(
            read_samples(shard, (*IMAGE_EXTENSIONS, *CLASS_EXTENSIONS)) for shard in self.shards
        )
        return itertools.islice(samples, self.topology.rank, None, self.topology.world_size)

    def evaluate(self, engine: FinetuneEngine, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """acc1 and acc5 (NaN below five classes) of `logits_of`, over the images of all ranks. Every rank calls it.

        Raises DataError for images without one class, of a class that the training images lack, or too many that cannot be
        used.
        """
        config, size = self.config, engine.engine.module.encoder.config.image_size
        rows, hits, self.skipped = engine.settings.micro_batch, [], Counter()
        batches = batches_of_images(self._own(), size, rows, max(1, config.workers), config.max_pixels)
        # Every rank makes as many passes: at ZeRO stage 3 each one gathers parameters from all.
        for _ in range(math.ceil(math.ceil(self.total / self.topology.world_size) / rows)):
            batch = next(batches, None)
            images = torch.zeros(0, 3, size, size, dtype=torch.uint8) if batch is None else batch.images
            padding = torch.zeros(rows - len(images), 3, size, size, dtype=torch.uint8)
            logits = logits_of(torch.cat([images, padding]))[: len(images)].cpu().double().numpy()
            if batch is None:
                continue
            self.skipped.update(reason.partition(":")[0] for _, reason in batch.skipped)
            truth = [self._class(key, parts, engine) for key, parts in zip(batch.keys, batch.parts, strict=True)]
            if truth:
                found = [top_k_accuracy(np.array(truth), logits, k) * len(truth) for k in (1, 5)]
                hits.append([*found, len(truth)])
        own = torch.tensor(
            [*np.sum(hits, axis=0), self.skipped.total()] if hits else [0.0, 0.0, 0.0, self.skipped.total()]
        )
        top1, top5, count, lost = collectives.sum_(own.double().to(self.topology.device), self.topology).tolist()
        if lost > config.max_skipped_fraction * (count + lost) or not count:
            raise DataError(
                f"{lost:.0f} of {count + lost:.0f} test images cannot be used, more than --max_skipped_fraction "
                f"{config.max_skipped_fraction:g} allows; of this rank: {dict(self.skipped)}. Mend or take them out."
            )
        self.count = round(count)
        return {"acc1": top1 / count, "acc5": top5 / count if engine.num_classes >= 5 else math.nan}

    def _class(self, key: str, parts: dict[str, bytes], engine: FinetuneEngine) -> int:
        found = true_classes(Path(self.config.test_shards), key, parts, self.config.classes_key)
        if len(found) != 1 or found[0] >= engine.num_classes:
            raise DataError(
                f"{self.config.test_shards}: image {key} has the classes {list(found)}: expected one below "
                f"{engine.num_classes}, the number of classes of the training images"
            )
        return found[0]


class FinetuneProgress(Progress):
    """Tells of a run with a classifier."""

    @staticmethod
    def _of_pairs(values: dict) -> list[str]:
        return [
            f"loss {values['train_loss']:.3f}",
            f"right {values['accuracy_mixed']:.1%} of mixed images",
            f"lr {values['lr_encoder']:.2e}",
            f"grad {values['grad_norm']:.2f}",
        ]


def save_result(
    run: RunFolder,
    config: FinetuneConfig,
    name: str,
    plan: RunPlan,
    step: int,
    epoch: float,
    metrics: dict[str, float],
    test: TestImages,
    weights: str = "",
) -> Path:
    """Writes the result of the newest epoch into RUN/results. weights: "", or the folder of the averaged ones."""
    details = {
        "main_metric": "acc1",
        "protocol": f"fine-tuned from {config.init_from}, {epoch:.4g} epochs",
        "step": step,
        "total_steps": plan.length.total_steps,
        "n_test": test.count,
        "settings": config.model_dump(),
    }
    dataset = config.dataset_name or config.test_shards
    return write_result(
        run.path / RESULTS, Result(dataset, name, f"run:{run.path / weights}", "finetune", metrics, details=details)
    )
