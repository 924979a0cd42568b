"""The startup card: what a run is about to do, every number with its reason; before anything is started."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mlcd_ds.config import RunConfig, split_paths
from mlcd_ds.contrastive import CHUNK_BYTES
from mlcd_ds.ds_config import DeepSpeedSettings
from mlcd_ds.models.text import TextConfig, TextTransformer
from mlcd_ds.models.vit import VisionTransformer, VitConfig
from mlcd_ds.partial_fc import workspace_bytes
from mlcd_ds.partition import ClassPartition
from mlcd_ds.schedule import RunLength

ACTIVATIONS_PER_TOKEN = 16
"""Tensors as wide as the token that a block keeps for its backward: input, 2 norms, q, k, v, attention (2), residual,
MLP hidden (4) and its activation (4), minus what is recomputed in place. With attention by
scaled_dot_product_attention no [T, T] matrix is among them."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank, by part; estimates from shapes, not measurements. host: what offloading puts beside the GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    head_step: int
    host: int = 0

    @property
    def total(self) -> int:
        """All parts on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.head_step


def count_parameters(tower: VitConfig | TextConfig) -> int:
    """Parameters of an encoder or a text tower, without allocating them."""
    with torch.device("meta"):
        model = VisionTransformer(tower) if isinstance(tower, VitConfig) else TextTransformer(tower)
        return sum(parameter.numel() for parameter in model.parameters())


def plan_memory(
    encoder: VitConfig,
    settings: DeepSpeedSettings,
    config: RunConfig,
    num_classes: Sequence[int],
    world_size: int,
    text: TextConfig | None = None,
) -> MemoryPlan:
    """What one rank will need, by the arithmetic of ZeRO (Rajbhandari et al. 2020, section 5) and of the heads.

    num_classes: of each head. text: the text tower of a run on captions, which has no heads.
    """
    of_image, of_text = count_parameters(encoder), 0 if text is None else count_parameters(text)
    parameters = of_image + of_text
    trained = of_text if config.lock_image else parameters
    size = 2 if settings.precision == "bfloat16" else 4
    stage, ranks = settings.zero_stage, world_size
    master = 4 if size == 2 else 0
    tokens = 1 + (encoder.image_size // encoder.patch_size) ** 2
    activations = 0 if config.lock_image else _activations(settings, encoder.layers, tokens * encoder.width * size)
    if text is not None:
        activations += _activations(settings, text.layers, text.context * text.width * size)
    heads = [_head_bytes(encoder, settings, config, classes, world_size) for classes in num_classes]
    weights = parameters * size // (ranks if stage == 3 else 1)
    optimizer = trained * (8 + master) // (ranks if stage >= 1 else 1)
    offloaded = {key for key in ("offload_param", "offload_optimizer") if key in settings.json["zero_optimization"]}
    return MemoryPlan(
        weights=0 if "offload_param" in offloaded else weights,
        gradients=trained * 4 // (ranks if stage >= 2 else 1),
        optimizer=0 if "offload_optimizer" in offloaded else optimizer,
        activations=activations,
        head=sum(centers for centers, _, _ in heads),
        # The heads' gradients live until the step; a workspace only until its head is done.
        head_step=sum(step for _, step, _ in heads)
        + max((workspace for _, _, workspace in heads), default=_contrast_bytes(encoder, settings, world_size)),
        host=weights * ("offload_param" in offloaded) + optimizer * ("offload_optimizer" in offloaded),
    )


def _activations(settings: DeepSpeedSettings, layers: int, bytes_per_image: int) -> int:
    """Bytes that a tower keeps of a micro-batch for its backward pass."""
    kept = layers + ACTIVATIONS_PER_TOKEN if settings.activation_checkpointing else layers * ACTIVATIONS_PER_TOKEN
    return kept * settings.micro_batch * bytes_per_image


def _contrast_bytes(encoder: VitConfig, settings: DeepSpeedSettings, world_size: int) -> int:
    """Bytes of the contrastive loss: both sides' embeddings of all ranks, two chunks of logits, own gradients."""
    own = settings.global_batch // world_size
    logits = min(CHUNK_BYTES, own * settings.global_batch * 4)
    return (2 * settings.global_batch + 6 * own) * encoder.embed_dim * 4 + 2 * logits


def _head_bytes(
    encoder: VitConfig, settings: DeepSpeedSettings, config: RunConfig, num_classes: int, world_size: int
) -> tuple[int, int, int]:
    """Bytes on one rank of one head: centers with moments, what a step keeps, workspace."""
    rows = ClassPartition(num_classes, world_size).max_size
    sampled = sampled_rows(config, settings.micro_batch * world_size, num_classes, world_size)
    gathered = settings.micro_batch * world_size
    # Micro-steps draw different rows: the sum of their gradients has them all.
    bfloat16 = "bfloat16" in (settings.precision, config.head_precision) and config.head_precision != "float32"
    # Logits in float32, and their exponentials rounded beside them; the kernels keep those alone.
    per_logit = (2 if config.head_kernels == "triton" else 6) if bfloat16 else 4
    merged = math.ceil(rows * (1 - (1 - sampled / rows) ** settings.accumulation)) if settings.accumulation > 1 else 0
    return (
        rows * (encoder.embed_dim * (8 if config.head_moments == "bfloat16" else 12) + 4),
        (3 * sampled + merged + 2 * gathered) * encoder.embed_dim * 4 + bfloat16 * sampled * encoder.embed_dim * 2,
        min(workspace_bytes(config.workspace_mb, sampled * per_logit), gathered * sampled * per_logit),
    )


def head_precisions(config: RunConfig, settings: DeepSpeedSettings, device_type: str) -> tuple[str, str]:
    """Dtype names: of the factors of the head's products, and of the embeddings that ranks send each other."""
    products = settings.precision if device_type == "cuda" else "float32"
    if config.head_precision != "auto":
        products = config.head_precision
    return products, products if config.gather_precision == "auto" else config.gather_precision


def sampled_rows(config: RunConfig, images: int, num_classes: int, world_size: int) -> int:
    """Rows of one shard in one micro-step, as expected: the distinct positives P, and negatives by --sample_budget.

    P of `images` images with l uniform labels each: K (1 - exp(-images l / K)). With --positives_drawn l is that number;
    with cd it is 1.
    """
    labels = 1 if config.objective == "cd" else config.labels_per_visit
    positives = num_classes * -math.expm1(-images * labels / num_classes)
    if config.sample_budget == "total":
        rows = max(config.sample_rate * num_classes, positives)
    else:
        rows = positives + config.sample_rate * (num_classes - positives)
    return math.ceil(rows / world_size)


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
    memory = plan_memory(encoder, settings, config, num_classes, world_size, text)
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
            f"embedding {encoder.embed_dim}, checkpointing {'on' if settings.activation_checkpointing else 'off'}",
        ),
        *(
            _head_lines(config, settings, num_classes, world_size, device)
            if text is None
            else _text_lines(config, settings, text)
        ),
        (
            "memory a rank",
            f"{_gb(memory.total)} (estimate): weights {_gb(memory.weights)}, gradients {_gb(memory.gradients)}, optimizer "
            f"{_gb(memory.optimizer)}, activations {_gb(memory.activations)}, "
            + (f"centers with moments {_gb(memory.head)}, head's step " if text is None else "contrastive loss ")
            + _gb(memory.head_step)
            + (f"; beside it {_gb(memory.host)} of host memory" if memory.host else ""),
        ),
        ("output", config.output_dir),
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


def _draw(config: RunConfig) -> str:
    if config.positives_drawn is None:
        return ""
    cd = ", of which cd takes the nearest" if config.objective == "cd" else ""
    return f" ({config.positives_drawn} drawn at each visit{cd})"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
