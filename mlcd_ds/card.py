"""The startup card: what a run is about to do, every number with its reason; before anything is started."""

from collections.abc import Sequence

from mlcd_ds.config import RunConfig, split_paths
from mlcd_ds.ds_config import DeepSpeedSettings
from mlcd_ds.memory import checkpoint_bytes, count_parameters, plan_memory, recompute_of, sampled_rows
from mlcd_ds.models.text import TextConfig
from mlcd_ds.models.vit import FUNCTION, PRESETS, VitConfig
from mlcd_ds.partition import ClassPartition
from mlcd_ds.schedule import RunLength


def head_precisions(config: RunConfig, settings: DeepSpeedSettings, device_type: str) -> tuple[str, str]:
    """Dtype names: of the factors of the head's products, and of the embeddings that ranks send each other."""
    products = settings.precision if device_type == "cuda" else "float32"
    if config.head_precision != "auto":
        products = config.head_precision
    return products, products if config.gather_precision == "auto" else config.gather_precision


def startup_card(
    config: RunConfig,
    settings: DeepSpeedSettings,
    encoder: VitConfig,
    length: RunLength,
    *,
    num_samples: int,
    num_shards: int,
    num_classes: Sequence[int],
    world_size: int,
    device: str,
    unused: Sequence[str] = (),
    text: TextConfig | None = None,
) -> str:
    """The card as text.

    num_classes: of each head, in the order of --labels. unused: what of the tars takes no part in the run
    (ShardTable.unused). text: the text tower of a run on captions.
    """
    memory = plan_memory(encoder, settings, config, num_classes, world_size, text, device)
    parameters = count_parameters(encoder)
    patches = (encoder.image_size // encoder.patch_size) ** 2
    rows = [
        ("ranks", f"{world_size} on {device}, {settings.precision}, ZeRO stage {settings.zero_stage}"),
        (
            "global batch",
            f"{settings.global_batch:,} images = {settings.micro_batch} a micro-batch x {settings.accumulation} "
            f"accumulated x {world_size} ranks",
        ),
        ("data", f"{num_samples:,} images in {num_shards:,} shards an epoch"),
        *[("unused", text) for text in unused],
        ("length", f"{length.total_steps:,} steps = {length.samples:,} samples = {length.epochs:.4g} epochs"),
        (
            "learning rate",
            f"{settings.learning_rate:g}, {length.warmup_steps:,} steps of warm-up"
            + (f"; centers x {config.head_lr_scale:g}" if text is None else ""),
        ),
        (
            "encoder",
            f"{config.model}, {encoder.image_size} px, {patches} patches, {parameters / 1e6:.1f}M parameters, "
            f"embedding {encoder.embed_dim}, checkpointing {recompute_of(config, settings, encoder, text)}"
            + _options(config, encoder),
        ),
        *(
            _head_lines(config, settings, num_classes, world_size, device)
            if text is None
            else _text_lines(config, settings, text)
        ),
        (
            "memory a rank",
            f"{_gb(memory.total)} (estimate, at the {memory.peak}): "
            + ", ".join(f"{part} {_gb(size)}" for part, size in memory.parts.items())
            + (f"; beside it {_gb(memory.host)} of host memory" if memory.host else ""),
        ),
        (
            "output",
            f"{config.output_dir}; a checkpoint takes about "
            f"{_gb(checkpoint_bytes(encoder, settings, config, num_classes, text))}, {config.keep_last + 1} at a time",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    notes = [f"  - {note}" for note in (*settings.notes, *length.notes)]
    return "\n".join(["mlcd_ds", *lines, "why:", *notes])


def _head_lines(
    config: RunConfig, settings: DeepSpeedSettings, num_classes: Sequence[int], world_size: int, device: str
) -> list[tuple[str, str]]:
    """One line per head, then how many rows of them a rank has."""
    images, several = settings.micro_batch * world_size, len(num_classes) > 1
    products, gather = head_precisions(config, settings, device)
    lines, counts = [], []
    weights, folders = config.head_weights or (1.0,) * len(num_classes), split_paths(config.labels)
    for index, (classes, weight, folder) in enumerate(zip(num_classes, weights, folders, strict=True)):
        lines.append(
            (
                f"head {index}" if several else "head",
                f"{config.objective}, {classes:,} classes, l={config.num_positives}{_draw(config)}, "
                f"r={config.sample_rate:g}, S={config.scale:g}, "
                f"{config.margin_type} margin {config.margin:g} ({config.margin_gradient}), "
                f"{products} products, {gather} gather"
                + (f", loss x {weight:g}, labels {folder}" if several or weight != 1 else ""),
            )
        )
        rows = ClassPartition(classes, world_size).max_size
        sampled = sampled_rows(config, images, classes, world_size)
        counts.append(f"{rows:,} centers, about {sampled:,} sampled a micro-step")
    return [*lines, ("rows a rank", "; ".join(counts))]


def _text_lines(config: RunConfig, settings: DeepSpeedSettings, text: TextConfig) -> list[tuple[str, str]]:
    locked = f"the image tower stays as {config.init_from} has it (LiT)" if config.lock_image else "both towers learn"
    passes = ", each image and text embedded twice" if settings.accumulation > 1 else ""
    return [
        (
            "text tower",
            f"{config.text_model}, {text.context} tokens of {text.vocabulary:,}, {count_parameters(text) / 1e6:.1f}M "
            f"parameters, embedding {text.embed_dim}",
        ),
        ("objective", f"clip: {settings.global_batch:,} images against their captions{passes}; {locked}"),
    ]


def _options(config: RunConfig, encoder: VitConfig) -> str:
    """What of the encoder is not as its preset has it."""
    parts = [
        f"{name} {value} as in the weights it starts from"
        for name in FUNCTION
        if (value := getattr(encoder, name)) != getattr(PRESETS[config.model], name)
    ]
    parts += [f"{config.register_tokens} registers"] if config.register_tokens else []
    parts += [
        f"{name.replace('_', ' ')} {value:g}"
        for name in ("drop_path", "patch_dropout")
        if (value := getattr(config, name))
    ]
    parts += ["apex norms"] if config.norm == "apex" else []
    parts += ["compiled block by block"] if config.compile else []
    return "".join(f", {part}" for part in parts)


def _draw(config: RunConfig) -> str:
    if config.positives_drawn is None:
        return ""
    cd = ", of which cd takes the nearest" if config.objective == "cd" else ""
    return f" ({config.positives_drawn} drawn at each visit{cd})"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
