"""Trains an encoder on cluster labels, or on captions.

deepspeed [--hostfile hosts] mlcd_ds/train.py --deepspeed_config ds_configs/vit_l14_8gpu.json \\
    --shards 'data/{00000..00099}.tar' --labels labels/ --model vit_l14 --output_dir run/
deepspeed [--hostfile hosts] mlcd_ds/train.py --deepspeed_config ds_configs/vit_l14_8gpu.json --objective clip \\
    --shards 'data/{00000..00099}.tar' --tokenizer clip/ --model vit_l14 --init_from run/ --lock_image --output_dir lit/
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import fire
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import checkpoint, cli, collectives
from mlcd_ds.card import head_precisions, startup_card
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
from mlcd_ds.ds_config import BatchSizes, load_deepspeed_config, resolve_deepspeed_config
from mlcd_ds.engine import TrainEngine
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.memory import checkpoint_bytes
from mlcd_ds.models.text import ImageTextModel, TextTransformer, text_preset
from mlcd_ds.models.vit import FUNCTION, VisionTransformer, VitConfig, norm_class, preset
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.partition import ClassPartition
from mlcd_ds.run_folder import RunFolder
from mlcd_ds.run_loop import (
    RunPlan,
    check_launch,
    check_same_program,
    check_shared,
    check_this_machine,
    dropping_of,
    longest_wait,
    program,
    run_steps,
    watched,
)
from mlcd_ds.schedule import resolve_run_length
from mlcd_ds.topology import Topology
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
    source = collectives.on_main(topology, starting_encoder, config, run)
    plan = plan_run(config, raw, batch, topology, table.num_samples, len(shards), labels, unused, tokenizer, source)
    if topology.is_main:
        print(plan.card, flush=True)
    collectives.on_main(topology, check_start, config, plan, run)
    classes = [info.num_classes for info in plan.labels]
    size = checkpoint_bytes(plan.encoder, plan.settings, config, classes, plan.text)
    check_this_machine(config, plan, topology, run, size)
    record = plan.record(config, table.fingerprint(), table.order(order.fingerprint()))
    collectives.on_main(topology, run.write_config, record, config.allow_changed)
    check_shared(run, topology)
    run.is_ours = True

    store = CheckpointStore(run.path, topology, config.keep_last, len(table.labels_infos), config.keep_every)
    found = store.find() if config.resume == "auto" else None
    context = 0 if plan.text is None else plan.text.context
    skipped = run.path / "skipped"
    loader = ImageLabelLoader(config, table, order, plan.encoder.image_size, topology, skipped, tokenizer, context)
    engine = build_engine(config, plan, topology, tokenizer, found)
    run_steps(
        run,
        config,
        plan,
        topology,
        watch,
        engine=engine,
        loader=loader,
        store=store,
        found=found,
        samples_per_epoch=table.num_samples,
        histogram_every=config.histogram_every_steps,
    )


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
    source: VitConfig | None = None,
) -> RunPlan:
    """Resolves what the run is. raw: the DeepSpeed JSON. labels: of each head. unused: see `startup_card`. tokenizer: of a
    run on captions. source: see `starting_encoder`; what its weights compute is kept.

    Raises ConfigError or DataError for what does not fit together.
    """
    encoder = preset(config.model, config.image_size, config.register_tokens)
    if source is not None:
        encoder = encoder.model_copy(update={name: getattr(source, name) for name in FUNCTION})
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
    run = RunFolder(config.output_dir)
    kept = run.global_batch() if config.resume == "auto" else None
    batch = BatchSizes.resolve(raw, world_size, kept)
    tokenizer = load_tokenizer(config)
    source = starting_encoder(config, run)
    plan = plan_run(config, raw, batch, planned, images, len(shards), labels, unused, tokenizer, source)
    check_start(config, plan, run)
    if topology.is_main:
        print(plan.card)


def starting_encoder(config: RunConfig, run: RunFolder) -> VitConfig | None:
    """The encoder whose weights the run begins with: its own, where it goes on from a checkpoint, else that of --init_from;
    None for random ones. Raises CheckpointError for one that cannot be read.
    """
    if goes_on(config, run):
        recorded = (run.config() or {}).get("encoder")
        return checkpoint.encoder_config(run.path) if recorded is None else VitConfig(**recorded)
    return None if config.init_from is None else checkpoint.encoder_config(config.init_from)


def goes_on(config: RunConfig, run: RunFolder) -> bool:
    """Whether the run goes on from a checkpoint of its own."""
    return config.resume == "auto" and bool(checkpoint.published(run.path / "checkpoints"))


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


def check_start(config: RunConfig, plan: RunPlan, run: RunFolder) -> None:
    """Refuses what a run cannot begin from: --init_from of another architecture, --centers that are not those of the labels.

    One that goes on from a checkpoint needs neither.
    """
    if goes_on(config, run):
        return
    if config.init_from is not None:
        checkpoint.check_architecture(plan.encoder, checkpoint.encoder_config(config.init_from), config.init_from)
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


if __name__ == "__main__":
    cli.run(fire.Fire, train, RunConfig)
