"""What a training run will take before it is paid for: memory, bytes of every collective, FLOPs, images a second, days.

Memory is memory.py's, held to measurement. Seconds are arithmetic from rates that are given or measured: FLOPs over the
matmul rate times the share of it that an encoder reaches, bytes over links. Nothing here was measured on a GPU.

Shapes: W ranks, n to a machine; B images a micro-batch and rank, A micro-batches a step, G = W B; D embedding; K classes, S
sampled rows of a shard; P parameters; T tokens.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mlcd_ds import collectives
from mlcd_ds.benchmarks.timing import table
from mlcd_ds.config import DeepSpeedDefaults, EncoderWork, HeadConfig, PlanConfig, RunConfig
from mlcd_ds.ds_config import BatchSizes, DeepSpeedSettings, resolve_deepspeed_config
from mlcd_ds.errors import ConfigError
from mlcd_ds.memory import REDUCED_AT_ONCE, MemoryPlan, count_parameters, plan_memory, recompute_of, sampled_rows
from mlcd_ds.models import flops
from mlcd_ds.models.recompute import resolve_recompute
from mlcd_ds.models.vit import Dropping, VitConfig, preset
from mlcd_ds.partial_fc import PartialFC, workspace_bytes
from mlcd_ds.topology import Topology

USABLE = 0.92
"""Of a GPU's memory: the rest is CUDA's context, NCCL's buffers and the allocator's gaps."""
USED_LINK = 0.8
"""Of a link's bandwidth that a large collective reaches."""
BACKWARD_SHARE = 2 / 3
HIDDEN = 0.9
"""Of the seconds of a collective that runs behind arithmetic: the rest shows, for both want the same memory and cores."""
FILL_TOKENS = 2048
"""Tokens of a micro-batch at which products reach half of their rate: fewer leave parts of a GPU idle. Assumed."""
EVEN_SHARE = 16
"""Images of a rank: a number with divisors."""
BYTES_PER_LOGIT = {"torch": 26, "triton": 6}
"""Read and written by the head beside its products (docs/head.md)."""
ADAM_BYTES = 30
"""Read and written for one parameter: gradient, float32 weight, two moments, and the weight's copy."""


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step.

    times: a step. size: bytes of the whole tensor of one. sent: by a rank, each time. hidden: behind what it may run, or "".
    group: ranks that take part, of neighbouring GPUs; None: all.
    """

    name: str
    kind: str
    times: int
    size: float
    hidden: str = ""
    group: int | None = None

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends each time: round a ring, an all-reduce goes twice."""
        return (2 if self.kind == "all-reduce" else 1) * self.size * (ranks - 1) / ranks

    def seconds(self, config: PlanConfig) -> float:
        """Of one: the slower of the links inside a machine and those between machines, which share the way; and hops."""
        W = min(config.gpus, self.group or config.gpus)
        n = min(W, config.gpus_per_node)
        if W == 1:
            return 0.0
        sent = self.sent(W)
        slowest = sent / (config.node_link_gb_per_s * 1e9 * USED_LINK)
        if n < W:
            # A ring per network card: the machine's n cards carry what enters it, once.
            slowest = max(slowest, sent / (n * config.link_gb_per_s * 1e9 * USED_LINK))
        hops = 2 * math.log2(W) if self.kind == "all-reduce" else W - 1
        return slowest + hops * config.latency_us * 1e-6


def encoder_flops(encoder: VitConfig, dropping: Dropping | None = None) -> tuple[int, int, int]:
    """FLOPs of one image: (forward, forward and backward, forward of one block before the last): models/flops.py."""
    costs = flops.costs(encoder, dropping)
    block = sum(cost.forward for name, cost in costs.items() if name.startswith("blocks.0."))
    whole = sum(costs.values(), flops.Cost())
    return whole.forward, whole.flops, block


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of one configuration. seconds: by part, on a rank, without what is hidden."""

    config: PlanConfig
    settings: DeepSpeedSettings
    encoder: VitConfig
    memory: MemoryPlan
    collectives: tuple[Collective, ...]
    encoder_flops: float
    head_flops: float
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Of all ranks; not more than their loaders deliver."""
        return min(self.settings.global_batch / self.step_seconds, self.loader_limit)

    @property
    def loader_limit(self) -> float:
        return self.config.gpus * self.config.cores_per_gpu * self.config.images_per_core

    @property
    def days(self) -> float:
        return self.config.samples * self.config.epochs / self.images_per_second / 86400

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE * self.config.gpu_gb * 1e9


def plan_step(config: PlanConfig, raw: dict) -> StepPlan:
    """The plan of `raw`, a DeepSpeed JSON, on config.gpus ranks. Raises ConfigError where they do not fit together."""
    encoder = preset(config.model, config.image_size, config.register_tokens)
    dropping = Dropping(0, patch_dropout=config.patch_dropout)
    batch = BatchSizes.resolve(raw, config.gpus)
    steps = max(2, math.ceil(config.samples * config.epochs / batch.global_batch))
    settings = resolve_deepspeed_config(
        raw, batch=batch, total_steps=steps, warmup_steps=min(2000, steps // 10), output_dir="run",
        device_type=config.device, defaults=DeepSpeedDefaults(),
    )  # fmt: skip
    run = _run_config(config)
    memory = plan_memory(encoder, settings, run, (config.num_classes,), config.gpus, device=config.device)
    rows = sampled_rows(run, settings.micro_batch * config.gpus, config.num_classes, config.gpus)
    exchanged = tuple(_collectives(config, settings, encoder, rows))
    images, A = settings.images_per_rank, settings.accumulation
    forward, both, block = encoder_flops(encoder, dropping)
    recompute = recompute_of(run, settings, encoder, None)
    if not recompute.selective:  # which keeps all products
        both += min(recompute.blocks * block, forward)
    G = settings.micro_batch * config.gpus
    head_flops = 6.0 * G * rows * encoder.embed_dim * A
    rate = (config.tflops or 1.0) * 1e12
    tokens = settings.micro_batch * (1 + encoder.registers + dropping.kept_patches(encoder.grid**2))
    filled = tokens / (tokens + FILL_TOKENS)
    compute = both * images / (rate * config.efficiency * filled)
    traffic = A * G * rows * BYTES_PER_LOGIT[config.head_kernels] + 10 * A * rows * encoder.embed_dim * 4
    parameters = count_parameters(encoder)
    share = 1 if settings.zero_stage == 0 else config.gpus
    stepped = ADAM_BYTES * (parameters / share + A * rows * encoder.embed_dim)
    offload = "offload_optimizer" in settings.json["zero_optimization"]
    hidden, shown = {"backward": 0.0, "encoder": 0.0, "head": 0.0}, {"head": 0.0, "ZeRO": 0.0}
    for one in exchanged:
        taken = one.times * one.seconds(config)
        behind = HIDDEN * taken if one.hidden else 0.0
        shown["ZeRO" if one.name.startswith("ZeRO") else "head"] += taken - behind
        if one.hidden:
            hidden[one.hidden] += behind
    head = head_flops / (rate * config.head_efficiency) + traffic / (config.memory_gb_per_s * 1e9)
    seconds = {
        "encoder": compute,
        "head": head,
        "head's collectives": shown["head"] + max(0.0, hidden["head"] - head / 3),
        "ZeRO's collectives": shown["ZeRO"]
        + max(0.0, hidden["backward"] - BACKWARD_SHARE * compute / A)
        + max(0.0, hidden["encoder"] - compute),
        # Offloaded: gradients down and weights up a PCIe link of 25 GB/s, Adam in the host's memory (20 GB/s a rank).
        "optimizer": stepped / (config.memory_gb_per_s * 1e9)
        + offload * parameters / share * (6 / 25e9 + ADAM_BYTES / 20e9),
    }
    return StepPlan(config, settings, encoder, memory, exchanged, both * images, head_flops, seconds)


def _run_config(config: PlanConfig) -> RunConfig:
    shared = {name: getattr(config, name) for part in (EncoderWork, HeadConfig) for name in part.model_fields}
    return RunConfig(deepspeed_config="-", shards="-", labels="-", output_dir="-", model=config.model, **shared)


def head_collectives(
    config: PlanConfig, settings: DeepSpeedSettings, encoder: VitConfig, rows: int
) -> list[Collective]:
    """Of one step: docs/head.md, section Communication."""
    B, W, A, D = settings.micro_batch, config.gpus, settings.accumulation, encoder.embed_dim
    G = W * B
    bfloat16 = "bfloat16" in (settings.precision, config.head_precision) and config.head_precision != "float32"
    gather = 2 if config.gather_precision == "bfloat16" or (config.gather_precision == "auto" and bfloat16) else 4
    labels = config.labels_per_visit
    per_logit = (2 if config.head_kernels == "triton" else 6) if bfloat16 else 4
    fits = max(1, workspace_bytes(config.workspace_mb, rows * per_logit) // (rows * per_logit))
    chunks = max(1, -(-G // min(G, fits)))
    return [
        Collective("labels of the next step", "all-gather", A, 4.0 * G * labels, "backward"),
        Collective("embeddings", "all-gather", A, float(gather * G * D)),
        Collective(f"sums of {chunks} chunk(s)", "all-reduce", A * chunks, 8.0 * G / chunks, "head"),
        Collective("embeddings' gradient", "reduce-scatter", A, 4.0 * G * D),
    ]


def _collectives(
    config: PlanConfig, settings: DeepSpeedSettings, encoder: VitConfig, rows: int
) -> Iterator[Collective]:
    if config.gpus == 1:
        return
    yield from head_collectives(config, settings, encoder, rows)
    P, A, stage = count_parameters(encoder), settings.accumulation, settings.zero_stage
    size = 2 if settings.precision == "bfloat16" else 4
    zero = settings.json["zero_optimization"]
    sent = 2 if settings.json.get("communication_data_type") == "bf16" else 4
    overlap = "backward" if zero.get("overlap_comm", stage == 3) else ""
    buckets = max(1, round(P / int(zero.get("reduce_bucket_size", REDUCED_AT_ONCE))))
    if stage == 0:
        yield Collective("ZeRO 0: gradients", "all-reduce", 1, float(sent * P))
    elif stage == 1:
        yield Collective("ZeRO 1: gradients", "all-reduce", 1, float(sent * P), overlap if size == 4 else "")
        yield Collective("ZeRO 1: weights", "all-gather", 1, float(size * P))
    elif stage == 2:
        # use_multi_rank_bucket_allreduce, on unless the JSON says otherwise: every bucket is reduced to all ranks.
        kind = "all-reduce" if zero.get("use_multi_rank_bucket_allreduce", True) else "reduce-scatter"
        yield Collective("ZeRO 2: gradients", kind, A * buckets, sent * P / buckets, overlap)
        yield Collective("ZeRO 2: weights", "all-gather", 1, float(size * P))
    else:
        hidden = "encoder" if int(zero.get("stage3_prefetch_bucket_size", 50_000_000)) else ""
        blocks = encoder.layers  # about one collective for each
        yield Collective("ZeRO 3: weights, forward", "all-gather", A * blocks, size * P / blocks, hidden)
        group = int(zero.get("zero_hpz_partition_size", 1))
        yield Collective(
            "ZeRO 3: weights, backward",
            "all-gather",
            A * blocks,
            size * P / blocks,
            hidden,
            group if group > 1 else None,
        )
        yield Collective("ZeRO 3: gradients", "reduce-scatter", A * buckets, sent * P / buckets, overlap)


def measured_tflops(device: str) -> tuple[float, str]:
    """Of a large matrix product here: bfloat16 on a GPU, float32 on a CPU; and what was measured."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rate = flops.measured_matmul_rate(torch.device("cuda" if on_gpu else "cpu"), dtype)
    kind = torch.cuda.get_device_name() if on_gpu else "CPU"
    warning = ""
    if device == "cuda" and not on_gpu:
        warning = ", which says nothing of a GPU: give --tflops for times that mean something"
    return rate / 1e12, f"measured: a large {str(dtype)[6:]} product on this {kind}{warning}"


# ------------------------------------------------------------------------------------------------- what a knob does


def variants(config: PlanConfig, raw: dict) -> Iterator[tuple[str, PlanConfig, dict]]:
    """(what is changed, settings, JSON), one knob at a time."""
    batch = BatchSizes.resolve(raw, config.gpus)
    sizes = {"train_batch_size": batch.global_batch, "train_micro_batch_size_per_gpu": batch.micro_batch}
    base = {key: value for key, value in raw.items() if key != "gradient_accumulation_steps"} | sizes
    for factor, words in ((2, "micro-batch x 2"), (0.5, "micro-batch / 2")):
        micro = int(batch.micro_batch * factor)
        if micro and batch.global_batch % (micro * config.gpus) == 0:
            yield words, config, base | {"train_micro_batch_size_per_gpu": micro}
    stage = int(raw.get("zero_optimization", {}).get("stage", 0))
    for other in (1, 2, 3):
        if other != stage:
            yield f"ZeRO {other}", config, with_stage(base, other)
    section = base.get("activation_checkpointing")
    now = resolve_recompute(config.checkpoint_layers, section, preset(config.model).layers)
    if config.checkpoint_layers is None:
        switched = {key: value for key, value in base.items() if key != "activation_checkpointing"}
        yield (
            "checkpointing " + ("off" if now.blocks else "on"),
            config,
            (switched if now.blocks else base | {"activation_checkpointing": {}}),
        )
    for choice in (0, "all", "selective"):
        asked = resolve_recompute(choice, None, preset(config.model).layers)
        if asked != now and (choice == "selective" or config.checkpoint_layers is not None):
            yield f"--checkpoint_layers {choice}", config.model_copy(update={"checkpoint_layers": choice}), base
    if stage in (1, 2, 3):
        zero = base["zero_optimization"] | {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
        yield "optimizer on the host", config, base | {"zero_optimization": zero}
    for rate in (1.0, 0.01):
        if rate != config.sample_rate:
            yield f"--sample_rate {rate:g}", config.model_copy(update={"sample_rate": rate}), base
    yield "classes x 2", config.model_copy(update={"num_classes": 2 * config.num_classes}), base
    yield "classes x 10", config.model_copy(update={"num_classes": 10 * config.num_classes}), base
    yield "--head_moments bfloat16", config.model_copy(update={"head_moments": "bfloat16"}), base
    if batch.global_batch % (2 * config.gpus) == 0:
        yield "GPUs x 2", config.model_copy(update={"gpus": 2 * config.gpus}), _for_ranks(base, 2 * config.gpus)


def _for_ranks(raw: dict, ranks: int) -> dict:
    """The same global batch; the micro-batch as it is, or the next smaller that fits."""
    total, micro = raw["train_batch_size"], raw["train_micro_batch_size_per_gpu"]
    each = total // ranks
    fitting = max(size for size in range(1, min(micro, each) + 1) if each % size == 0)
    return raw | {"train_micro_batch_size_per_gpu": fitting}


_STAGE_KEYS = {
    1: {"allgather_bucket_size": 200_000_000},
    2: {"contiguous_gradients": True, "overlap_comm": True, "reduce_bucket_size": 50_000_000},
    3: {
        "contiguous_gradients": True, "overlap_comm": True, "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 200_000_000, "stage3_max_reuse_distance": 200_000_000,
    },
}  # fmt: skip


def with_stage(raw: dict, stage: int) -> dict:
    """The JSON with another ZeRO stage and the buckets that go with it; offloading stays."""
    kept = {k: v for k, v in raw.get("zero_optimization", {}).items() if k.startswith("offload_optimizer")}
    return raw | {"zero_optimization": {"stage": stage, **_STAGE_KEYS[stage], **kept}}


def suggest(config: PlanConfig, raw: dict) -> tuple[StepPlan, dict]:
    """The fastest of all stages, micro-batches, checkpointing on and off, and offloading, that fits: (its plan, its JSON).

    The global batch is that of `raw`, or, where the ranks cannot share it, the nearest that gives each a multiple of
    EVEN_SHARE. Loaders are left out of it. Of those that are as fast to a hundredth, one without offloading, of the lowest
    ZeRO stage, and the least memory. Raises ConfigError where none fits.
    """
    total = raw.get("train_batch_size") or BatchSizes.resolve(raw, config.gpus).global_batch
    if total % config.gpus:
        total = max(1, round(total / (EVEN_SHARE * config.gpus))) * EVEN_SHARE * config.gpus
    each = total // config.gpus
    plain = {k: v for k, v in raw.items() if k not in ("gradient_accumulation_steps", "activation_checkpointing")}
    plain["zero_optimization"] = {}
    sizes = [size for size in range(1, each + 1) if each % size == 0]
    found: list[tuple[StepPlan, dict]] = []
    least: StepPlan | None = None
    for stage in (1, 2, 3):
        for checkpointing in (False, True):
            for offload in (False, True):
                for micro in sizes:
                    json_ = with_stage(plain, stage) | {
                        "train_batch_size": total,
                        "train_micro_batch_size_per_gpu": micro,
                    }
                    if offload:
                        json_["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
                    if checkpointing:
                        json_["activation_checkpointing"] = {}
                    plan = plan_step(config, json_)
                    if least is None or plan.memory.total < least.memory.total:
                        least = plan
                    if plan.fits:
                        found.append((plan, json_))
    if not found:
        raise ConfigError(
            f"nothing fits {config.gpu_gb:g} GB on {config.gpus} GPUs: the least is {least.memory.total / 1e9:.1f} GB, "
            f"{_parts(least.memory)}. Take more or larger GPUs, fewer classes, or --head_moments bfloat16."
        )
    fastest = min(plan.step_seconds for plan, _ in found)
    quick = (each for each in found if 0.99 * each[0].step_seconds <= fastest)
    return min(quick, key=lambda each: (bool(each[0].memory.host), each[0].settings.zero_stage, each[0].memory.total))


# ------------------------------------------------------------------------------------------------- a pretended step


def pretended_step(plan: StepPlan) -> list[tuple[str, int, int]]:
    """(collective, times, bytes each of the whole tensor) of one micro-step of rank 0's head among ranks that are not there.

    The head is the real one, with its shard, its rows and its collectives; a process group that does nothing answers them.
    """
    config, settings = plan.config, plan.settings
    topology = Topology.pretended(config.gpus)
    counted: dict[tuple[str, int], int] = {}

    def counting(name: str, function, whole):
        def call(*arguments, **options):
            tensor = whole(arguments)
            key = name, tensor.numel() * tensor.element_size()
            counted[key] = counted.get(key, 0) + 1
            return function(*arguments, **options)

        return call

    kept = collectives._all_gather_single, collectives._reduce_scatter_single, dist.all_reduce
    try:
        collectives._all_gather_single = counting("all-gather", kept[0], lambda a: a[0])
        collectives._reduce_scatter_single = counting("reduce-scatter", kept[1], lambda a: a[1])
        dist.all_reduce = counting("all-reduce", kept[2], lambda a: a[0])
        options = {name: getattr(config, name) for name in PartialFC.SETTINGS}
        bfloat16 = settings.precision == "bfloat16" and config.head_precision == "auto"
        gather = "bfloat16" if bfloat16 and config.gather_precision == "auto" else "float32"
        head = PartialFC(config.num_classes, plan.encoder.embed_dim, topology, gather_precision=gather, **options)
        generator = torch.Generator().manual_seed(0)
        shape = settings.micro_batch, config.labels_per_visit
        labels = torch.randint(0, config.num_classes, shape, generator=generator)
        embeddings = torch.randn(settings.micro_batch, plan.encoder.embed_dim, generator=generator, requires_grad=True)
        head(embeddings, labels, step=0, capacity=settings.micro_batch).loss.backward()
    finally:
        collectives._all_gather_single, collectives._reduce_scatter_single, dist.all_reduce = kept
        topology.stop()
    return [(name, times, size) for (name, size), times in counted.items()]


# ------------------------------------------------------------------------------------------------- telling


def card(plan: StepPlan, source: str, raw: dict) -> str:
    """The plan for people. source: where the matmul rate is from."""
    config, settings, memory = plan.config, plan.settings, plan.memory
    kind = "GPUs" if config.device == "cuda" else "CPU ranks"
    unit = 1e9 if memory.total > 1e9 else 1e6
    lines = [
        f"{config.model}, {plan.encoder.image_size} px, {config.num_classes:,} classes, on {config.gpus} {kind} "
        f"({config.gpus_per_node} to a machine), {settings.precision}, ZeRO {settings.zero_stage}, checkpointing "
        f"{recompute_of(_run_config(config), settings, plan.encoder, None)}, l = {config.num_positives}"
        + (f" of which {config.positives_drawn} drawn" if config.positives_drawn else ""),
        f"global batch    {settings.global_batch:,} images = {settings.micro_batch} x {settings.accumulation} accumulated x "
        f"{config.gpus}",
        f"matmul rate     {config.tflops:.4g} TFLOP/s ({source}); the encoder reaches {config.efficiency:.0%} of it, the "
        f"head's products {config.head_efficiency:.0%} (assumed)",
        f"links           {config.node_link_gb_per_s:g} GB/s in a machine, {config.link_gb_per_s:g} GB/s a network card, "
        f"{config.latency_us:g} us a hop (given or assumed)",
        "",
        f"memory a rank   {memory.total / 1e9:.2f} GB at its peak ({memory.peak}), "
        f"{'fits' if plan.fits else 'DOES NOT FIT'} {config.gpu_gb:g} GB"
        + (f"; {memory.host / 1e9:.2f} GB of the host's" if memory.host else ""),
        *[f"  {size / unit:>9.3f} {'GB' if unit == 1e9 else 'MB'}  {name}" for name, size in memory.parts.items()],
        "",
        table(
            [
                {
                    "collective": one.name, "kind": one.kind, "times a step": str(one.times),
                    "MB sent each": f"{one.sent(config.gpus) / 1e6:.4g}",
                    "ms each": f"{one.seconds(config) * 1e3:.3g}", "hidden behind": one.hidden or "-",
                }
                for one in plan.collectives
            ]
        )
        if plan.collectives
        else "no collectives: one rank",
        "",
        f"FLOPs of a step and rank: encoder {plan.encoder_flops:.3e}, head {plan.head_flops:.3e}",
        "seconds of a step: "
        + ", ".join(f"{name} {value:.4g} ({value / plan.step_seconds:.2%})" for name, value in plan.seconds.items()),
        f"loader          {plan.images_per_second / config.gpus:,.0f} images/s a rank, "
        f"{plan.settings.global_batch / plan.step_seconds / config.gpus / config.images_per_core:.3g} cores at "
        f"{config.images_per_core:g} a core ({config.cores_per_gpu:g} there)"
        + (": THE LOADER IS THE LIMIT" if plan.images_per_second == plan.loader_limit else ""),
        f"images/s        {plan.images_per_second:,.0f}, {plan.images_per_second / config.gpus:,.1f} a rank",
        f"whole run       {config.epochs:g} epochs of {config.samples:,} images: {plan.days:,.2f} days, "
        f"{plan.days * 24 * config.gpus:,.0f} GPU-hours",
        "",
        knobs(plan, raw),
    ]  # fmt: skip
    return "\n".join(lines)


def knobs(plan: StepPlan, raw: dict) -> str:
    """A line per knob: what changes."""
    rows = [_row("as it is", plan, plan)]
    for words, config, json_ in variants(plan.config, raw):
        rows.append(_row(words, plan_step(config, json_), plan))
    return table(rows)


def _row(words: str, plan: StepPlan, base: StepPlan) -> dict[str, str]:
    return {
        "knob": words,
        "GB": f"{plan.memory.total / 1e9:.2f}" + ("" if plan.fits else " (too much)"),
        "images/s": f"{plan.images_per_second:,.0f}",
        "x": f"{plan.images_per_second / base.images_per_second:.3f}",
        "days": f"{plan.days:.2f}",
        "GPU-hours": f"{plan.days * 24 * plan.config.gpus:,.0f}",
        "head": f"{(plan.seconds['head'] + plan.seconds[HEADS]) / plan.step_seconds:.2%}",
        "ZeRO": f"{plan.seconds[ZEROS] / plan.step_seconds:.2%}",
    }


HEADS, ZEROS = "head's collectives", "ZeRO's collectives"


def _parts(memory: MemoryPlan) -> str:
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.parts.items())


def suggestion(plan: StepPlan, json_: dict) -> str:
    """The JSON, with what it comes to in front."""
    config = plan.config
    return (
        f"// {config.model}, {config.num_classes:,} classes, {config.gpus} GPUs of {config.gpu_gb:g} GB: "
        f"{plan.memory.total / 1e9:.1f} GB, "
        f"{plan.images_per_second:,.0f} images/s, {plan.days:.1f} days by arithmetic (tools/plan.py)\n"
        + json.dumps(json_, indent=2)
    )


def compare_pretended(plan: StepPlan) -> str:
    """Counted beside planned, a line per kind and size of collective. Raises ConfigError where they differ."""
    rows = sampled_rows(
        _run_config(plan.config),
        plan.settings.micro_batch * plan.config.gpus,
        plan.config.num_classes,
        plan.config.gpus,
    )
    planned: dict[str, float] = {}
    for one in head_collectives(plan.config, plan.settings, plan.encoder, rows):
        planned[one.kind] = planned.get(one.kind, 0) + one.size * one.times / plan.settings.accumulation
    counted: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, times, size in pretended_step(plan):
        counted[name] = counted.get(name, 0) + times * size
        calls[name] = calls.get(name, 0) + times
    rows_ = [
        {"collective": name, "calls": str(calls.get(name, 0)), "counted bytes": f"{counted.get(name, 0):,.0f}",
         "planned bytes": f"{planned[name]:,.0f}"}
        for name in planned
    ]  # fmt: skip
    wrong = [name for name in planned if abs(counted.get(name, 0) - planned[name]) > 0.01 * planned[name]]
    text = f"rank 0's head among {plan.config.gpus} pretended ranks, one micro-step\n{table(rows_)}"
    if wrong:
        raise ConfigError(f"{text}\nthe plan's bytes of {', '.join(wrong)} are not those of a real step")
    return text
