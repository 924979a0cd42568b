"""What a training step takes of one rank's memory, by arithmetic on shapes; tests/test_step_plan.py holds it to measurement.

Some parts stay from step to step, others exist at one moment only, and no two moments at the same time. The peak is what
stays beside the largest moment. P parameters that are trained, W ranks, "float32 gradients" are 4 P bytes.

What DeepSpeed 0.19 keeps beyond the arithmetic of ZeRO (Rajbhandari et al. 2020, section 5), each found by measuring:
  - stages 1 to 3 keep a float32 copy of their share of the weights in float32 runs, too;
  - stages 1 and 2 make a copy of their share of the gradients for the optimizer, stage 3 in bfloat16 and float32;
  - stage 1 in bfloat16 keeps the whole float32 gradient all the time, and bfloat16 gradients beside it until the step; it is
    reduced through a copy of up to REDUCED_AT_ONCE elements, when the backward pass has ended;
  - torch's AdamW (CPUs) makes two temporaries as large as a rank's share, DeepSpeed's fused one (GPUs) none;
  - gloo (CPUs) gathers weights through a copy of them;
  - stage 3 keeps weights after the forward pass that are used again within stage3_max_reuse_distance elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mlcd_ds.config import RunConfig
from mlcd_ds.contrastive import CHUNK_BYTES
from mlcd_ds.ds_config import DeepSpeedSettings
from mlcd_ds.models.recompute import Recompute, resolve_recompute
from mlcd_ds.models.text import TextConfig, TextTransformer
from mlcd_ds.models.vit import Dropping, VisionTransformer, VitConfig
from mlcd_ds.partial_fc import workspace_bytes
from mlcd_ds.partition import ClassPartition

REDUCED_AT_ONCE = 500_000_000
"""Elements of DeepSpeed's buckets where the JSON has no size for them."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements: stage3_max_reuse_distance and stage3_max_live_parameters where the JSON has none."""
BACKWARD_BLOCKS = 1
"""Blocks whose gradients are in flight while those before them are reduced."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank's device.

    resident: what stays, by part. moments: what is there beside it at some moment, by part. host: what offloading puts
    into the host's memory.
    """

    resident: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: int = 0

    @property
    def peak(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """By part, at the peak."""
        return self.resident | self.moments[self.peak]

    @property
    def total(self) -> int:
        """At the peak."""
        return sum(self.parts.values())


@lru_cache(maxsize=32)
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
    device: str = "cuda",
) -> MemoryPlan:
    """What one rank needs. num_classes: of each head. text: the text tower of a run on captions, which has no heads.

    device: "cuda" or "cpu". The first is arithmetic from what was measured on the second: no GPU has confirmed it.
    """
    of_image, of_text = count_parameters(encoder), 0 if text is None else count_parameters(text)
    engine = _Engine(
        parameters=of_image + of_text,
        trained=of_text if config.lock_image else of_image + of_text,
        block=count_parameters(encoder) // encoder.layers,
        settings=settings,
        ranks=world_size,
        device=device,
    )
    recompute = recompute_of(config, settings, encoder, text)
    activations = 0
    if not config.lock_image:
        activations = activation_bytes(encoder, settings, recompute, config.patch_dropout)
    if text is not None:
        per_micro_batch = settings.micro_batch * text.context * text.width * engine.size
        activations += int(_kept_of_text(recompute, text.layers) * per_micro_batch)
    heads = [_Head(encoder, settings, config, classes, world_size) for classes in num_classes]
    gathered = 2 * settings.micro_batch * world_size * encoder.embed_dim * 4
    contrast = 0 if heads else _contrast_bytes(encoder, settings, world_size)
    # The heads' gradients live until the step; a workspace only until its head is done. CPUs keep both.
    rows, workspace = sum(head.rows for head in heads), max((head.workspace for head in heads), default=0)
    merged = sum(head.merged for head in heads)
    kept_rows = rows + workspace if device == "cpu" else 0
    resident = engine.resident() | {
        "centers": sum(head.centers for head in heads),
        "moments of the centers": sum(head.moments for head in heads),
    }
    step = {"rows of the head": rows + workspace if device == "cpu" else rows, "merged rows of the head": merged}
    embeddings = {"gathered embeddings": gathered if heads else contrast}
    forward = {"activations": activations, "workspace of the head": 0 if device == "cpu" else workspace}
    moments = {
        "head": forward | step | embeddings | engine.between(),
        "backward": {"activations": activations} | step | embeddings | engine.backward(activations),
        "optimizer": engine.step() | {"rows of the head": max(kept_rows, rows), "merged rows of the head": merged},
    }
    reducing = engine.reducing()
    if reducing:
        moments["reduction"] = reducing | step
    return MemoryPlan(_without_zeros(resident), {k: _without_zeros(v) for k, v in moments.items()}, engine.host())


def checkpoint_bytes(
    encoder: VitConfig,
    settings: DeepSpeedSettings,
    config: RunConfig,
    num_classes: Sequence[int],
    text: TextConfig | None = None,
) -> int:
    """About how large a checkpoint of all ranks is: weights as trained and in float32, for users; moments; heads' rows.

    num_classes: of each head. text: the text tower of a run on captions. Under ZeRO the engine keeps its own
    float32 weights beside.
    """
    weights = (2 if settings.precision == "bfloat16" else 4) + 4 + (4 if settings.zero_stage else 0)
    row = encoder.embed_dim * (8 if config.head_moments == "bfloat16" else 12) + 4
    parameters = count_parameters(encoder) + (0 if text is None else count_parameters(text))
    return parameters * (weights + 8) + sum(num_classes) * row


def _without_zeros(parts: dict[str, int]) -> dict[str, int]:
    return {name: int(size) for name, size in parts.items() if size}


def recompute_of(
    config: RunConfig, settings: DeepSpeedSettings, encoder: VitConfig, text: TextConfig | None
) -> Recompute:
    """Which blocks are computed again. Raises ConfigError as `resolve_recompute`."""
    layers = max(encoder.layers, 0 if text is None else text.layers)
    return resolve_recompute(config.checkpoint_layers, settings.json.get("activation_checkpointing"), layers)


def activation_bytes(
    encoder: VitConfig, settings: DeepSpeedSettings, recompute: Recompute, patch_dropout: float = 0.0
) -> int:
    """Bytes that the encoder has of a micro-batch at the worst moment of its backward pass: `kept_bytes`, and what that
    moment makes.

    That is the last block, which has the keys, values and norm of all tokens with their gradients; or the one before it,
    whose backward pass makes as much as its hidden layer and its input are; or a block that is computed again as a whole.
    """
    width = _token_bytes(encoder, settings, patch_dropout)
    last_makes, block_makes = 3, 1 + encoder.mlp_width / encoder.width
    per_block, last = _per_block(encoder)
    again = min(recompute.blocks, encoder.layers)
    makes = max(last_makes, block_makes - last) if again < encoder.layers else block_makes
    if again:  # the block that is being computed again
        makes = max(makes, block_makes + per_block - (1 if not recompute.selective else 0))
    images = settings.micro_batch * 3 * encoder.image_size**2  # as they came, a byte a value
    return kept_bytes(encoder, settings, recompute, patch_dropout) + images + int(makes * width)


def kept_bytes(
    encoder: VitConfig, settings: DeepSpeedSettings, recompute: Recompute, patch_dropout: float = 0.0
) -> int:
    """Bytes that autograd keeps of a micro-batch between the encoder's forward and its backward pass, without weights.

    A block keeps its input, 2 norms, q, k, v, attention and residual (8 of the token's width), and the MLP's hidden layer
    before and after its activation (of quick_gelu the sigmoid, too); no [T, T] matrix with scaled_dot_product_attention.
    With rotary positions q and k turned and what turns them, besides. The last block, which serves the class token alone,
    keeps its input, its norm, k and v. Before the blocks come the normalised images and the embedding. A block that is
    computed again keeps its input alone; selectively: its input, q, k, v, attention, its projection, and the MLP's hidden
    layer once.
    """
    size = 2 if settings.precision == "bfloat16" else 4
    ratio = encoder.mlp_width / encoder.width
    per_block, last = _per_block(encoder)
    again = min(recompute.blocks, encoder.layers)
    again_but_last = min(again, encoder.layers - 1)
    kept = again_but_last * (6 + ratio if recompute.selective else 1)
    kept += (encoder.layers - 1 - again_but_last) * per_block
    kept += last if again < encoder.layers else 3 if recompute.selective else 1
    images = settings.micro_batch * 3 * encoder.image_size**2 * size
    return int((kept + 1) * _token_bytes(encoder, settings, patch_dropout) + images)


def _token_bytes(encoder: VitConfig, settings: DeepSpeedSettings, patch_dropout: float) -> int:
    """Of one tensor as wide as all tokens of a micro-batch."""
    size = 2 if settings.precision == "bfloat16" else 4
    kept_patches = Dropping(0, patch_dropout=patch_dropout).kept_patches(encoder.grid**2)
    return settings.micro_batch * (1 + encoder.registers + kept_patches) * encoder.width * size


def _per_block(encoder: VitConfig) -> tuple[float, float]:
    """Tensors as wide as the tokens that a block keeps, and those of the last one."""
    hidden = 2 if encoder.activation == "gelu" else 3  # quick_gelu keeps its sigmoid, too
    return 8 + hidden * encoder.mlp_width / encoder.width + (3 if encoder.rope else 0), 4 + (1 if encoder.rope else 0)


def _kept_of_text(recompute: Recompute, layers: int) -> float:
    """Tensors as wide as the tokens that a text tower's blocks keep."""
    again = min(recompute.blocks, layers)
    at_once = 16 if again else 0  # the block that is being computed again
    return again * (10 if recompute.selective else 1) + (layers - again) * 16 + at_once


@dataclass(frozen=True)
class _Engine:
    """DeepSpeed's part. parameters: all; trained: P; block: of one block of the encoder."""

    parameters: int
    trained: int
    block: int
    settings: DeepSpeedSettings
    ranks: int
    device: str

    @property
    def size(self) -> int:
        """Bytes of a weight in the forward pass."""
        return 2 if self.settings.precision == "bfloat16" else 4

    @property
    def _zero(self) -> dict:
        return self.settings.json["zero_optimization"]

    @property
    def _stage(self) -> int:
        return self.settings.zero_stage

    @property
    def _share(self) -> int:
        """float32 bytes of a rank's share of the trained parameters."""
        return 4 * self.trained // (self.ranks if self._stage else 1)

    def _offloaded(self, key: str) -> bool:
        return key in self._zero

    def resident(self) -> dict[str, int]:
        weights = self.parameters * self.size // (self.ranks if self._stage == 3 else 1)
        has_copy = self._stage > 0 or self.size == 2
        on_host = self._offloaded("offload_optimizer")
        gradients = 0
        if self.size == 2 and self._stage <= 1:
            gradients = 4 * self.trained
        elif self._stage == 3 and not on_host:
            gradients = self._share
        return {
            "weights": 0 if self._offloaded("offload_param") else weights,
            "float32 weights": self._share if has_copy and not on_host else 0,
            "moments of the weights": 0 if on_host else 2 * self._share,
            "gradients": gradients,
            "buckets": 4 * self._bucket() if self._stage == 3 else 0,
            "second weights (hpZ)": self._second_weights(),
        }

    def _second_weights(self) -> int:
        """A share of the weights in each group of zero_hpz_partition_size ranks, for the backward pass."""
        group = int(self._zero.get("zero_hpz_partition_size", 1))
        return self.parameters * self.size // group if self._stage == 3 and group > 1 else 0

    def host(self) -> int:
        """float32 weights, moments and gradients of a rank's share, and its share of the weights."""
        host = 4 * self._share if self._offloaded("offload_optimizer") else 0
        return host + (self.parameters * self.size // self.ranks if self._offloaded("offload_param") else 0)

    def _bucket(self) -> int:
        """Elements of the buckets that gradients are reduced in."""
        double = 2 if self._zero.get("overlap_comm", self._stage == 3) else 1
        return double * min(int(self._zero.get("reduce_bucket_size", REDUCED_AT_ONCE)), self.trained * 4)

    def _gathered(self) -> int:
        """Weights that stage 3 has gathered when the forward pass ends."""
        if self._stage < 3:
            return 0
        reuse = int(self._zero.get("stage3_max_reuse_distance", LIVE_PARAMETERS)) // 2
        live = int(self._zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
        ahead = min(int(self._zero.get("stage3_prefetch_bucket_size", 50_000_000)), live)
        return min(self.parameters, max(reuse, 0) + ahead + 2 * self.block) * self.size

    def between(self) -> dict[str, int]:
        """Between two micro-batches: gathered weights, and the gradients of those before."""
        several = self.settings.accumulation > 1
        whole = {0: self.trained * self.size, 1: self.trained * self.size, 2: self._share, 3: 0}[self._stage]
        if self.size == 2 and self._stage == 2 and self._offloaded("offload_optimizer"):
            whole = 0
        return {"gathered weights": self._gathered(), "gradients until the step": whole if several else 0}

    def backward(self, activations: int) -> dict[str, int]:
        """Gradients come while activations go: the more of the two ends counts."""
        parts = self.between()
        in_flight = BACKWARD_BLOCKS * self.block * self.size
        if self._stage <= 1:
            whole = self.trained * self.size
            parts["gradients until the step"] = max(
                parts["gradients until the step"], whole - activations if whole > activations else in_flight
            )
        else:
            parts["gradients on the way"] = in_flight
        if self._stage in (1, 2) and not (self._stage == 1 and self.size == 2):
            parts["buckets on the way"] = (self.size if self._stage == 2 else 4) * self._bucket()
        return parts

    def reducing(self) -> dict[str, int]:
        """Stages that reduce when the backward pass has ended."""
        if self._stage == 0 or (self._stage == 1 and self.size == 2):
            copy = 4 * min(self.trained, REDUCED_AT_ONCE) if self.ranks > 1 else 0
            return {"gradients until the step": self.trained * self.size, "buckets on the way": copy}
        return {}

    def step(self) -> dict[str, int]:
        on_host = self._offloaded("offload_optimizer")
        share = 0 if on_host else self._share
        gradients = {0: self.trained * 4 if self.size == 4 else 0, 1: 2 * share, 2: 2 * share, 3: share}[self._stage]
        if self.size == 2:
            gradients = {0: 2 * self.trained, 1: 2 * self.trained, 2: share, 3: share}[self._stage]
        temporaries = 2 * share if self.device == "cpu" and self._stage else 0
        gathering = 0
        if self._stage in (1, 2) and self.device == "cpu":
            gathering = self.parameters * self.size
        if gathering > gradients + temporaries:
            return {"weights on the way": gathering}
        return {"gradients until the step": gradients, "temporaries of the optimizer": temporaries}


class _Head:
    """Bytes on one rank of one head: centers, their moments and counts, what a step keeps, workspace."""

    def __init__(
        self, encoder: VitConfig, settings: DeepSpeedSettings, config: RunConfig, num_classes: int, world_size: int
    ):
        rows = ClassPartition(num_classes, world_size).max_size
        images = settings.micro_batch * world_size
        sampled = sampled_rows(config, images, num_classes, world_size)
        bfloat16 = "bfloat16" in (settings.precision, config.head_precision) and config.head_precision != "float32"
        # Logits in float32, and their exponentials rounded beside them; the kernels keep those alone.
        per_logit = (2 if config.head_kernels == "triton" else 6) if bfloat16 else 4
        # Micro-steps draw different rows: the sum of their gradients has them all.
        several = settings.accumulation > 1
        merged = math.ceil(rows * (1 - (1 - sampled / rows) ** settings.accumulation)) if several else 0
        row = encoder.embed_dim * 4
        self.centers = rows * row
        self.moments = rows * (encoder.embed_dim * (4 if config.head_moments == "bfloat16" else 8) + 4)
        self.rows = (2 * sampled + 16) * row + bfloat16 * sampled * encoder.embed_dim * 2
        self.merged = merged * row
        self.workspace = min(workspace_bytes(config.workspace_mb, sampled * per_logit), images * sampled * per_logit)


def _contrast_bytes(encoder: VitConfig, settings: DeepSpeedSettings, world_size: int) -> int:
    """Bytes of the contrastive loss: both sides' embeddings of all ranks, two chunks of logits, own gradients."""
    own = settings.global_batch // world_size
    logits = min(CHUNK_BYTES, own * settings.global_batch * 4)
    return (2 * settings.global_batch + 6 * own) * encoder.embed_dim * 4 + 2 * logits


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
