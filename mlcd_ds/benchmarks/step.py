"""Whole optimizer steps: images a second, MFU, memory and the head's share, ours against transformers' encoder.

Both encoders are trained by the same engine, with the same head, on the same images; the contenders of one shape run in
turn, with a large bare product among them, whose rate is what MFU is a share of. A GPU where there is one; under a launcher
(`deepspeed --num_gpus 8 tools/bench.py step ...`) all its ranks, of which a step takes as long as the slowest.
"""

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from mlcd_ds.batch import ImageLabelBatch
from mlcd_ds.benchmarks.head import bare_cube
from mlcd_ds.benchmarks.timing import Contender, command_line, in_processes, peak_bytes, table, time_in_turn
from mlcd_ds.config import BenchStepConfig, DeepSpeedDefaults, EncoderOptions, HeadConfig, RunConfig, ToyShardsConfig
from mlcd_ds.data.labels import LabelsInfo, label_path, write_label_shard
from mlcd_ds.data.loader import ImageLabelLoader
from mlcd_ds.data.plan import EpochPlan
from mlcd_ds.data.shards import build_shard_table
from mlcd_ds.data.tar_index import find_index
from mlcd_ds.data.tars import expand_shards
from mlcd_ds.data.toy import write_toy_shards
from mlcd_ds.ds_config import BatchSizes, resolve_deepspeed_config
from mlcd_ds.engine import TrainEngine
from mlcd_ds.errors import ConfigError
from mlcd_ds.files import write_json
from mlcd_ds.models import flops
from mlcd_ds.models.compiled import cache_counts
from mlcd_ds.models.hf import config_there
from mlcd_ds.models.vit import BlockRunner, VisionTransformer, VitConfig, normalised, preset
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.profiling import HEAD
from mlcd_ds.topology import Topology

LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Largest relative difference between the first losses of ours and of transformers' encoder with the same weights."""

SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the bare product."""

COUNTED_STEPS = 3
"""Steps that the head's share is taken over."""


@dataclass(frozen=True)
class Setting:
    """One line of the table. checkpointing: as --checkpoint_layers, "none" for off. encoder: "ours" or "transformers"."""

    preset: str
    micro_batch: int
    zero_stage: int
    checkpointing: str = "none"
    compile: bool = False
    encoder: str = "ours"

    def __str__(self) -> str:
        compiled = "_compile" if self.compile else ""
        return f"{self.encoder}_{self.preset}_B{self.micro_batch}_zero{self.zero_stage}_{self.checkpointing}{compiled}"


def settings_of(config: BenchStepConfig) -> list[list[Setting]]:
    """Groups that run in turn: of each preset, micro batch and ZeRO stage all others. Raises ConfigError for bad lists."""
    compiles = {"off": [False], "on": [True], "both": [False, True]}[config.compile]
    groups = []
    for name in config.presets.split(",") if config.presets else [DEFAULT_PRESET[device_type()]]:
        rope = preset(name).rope
        for micro_batch in config.micro_batches or DEFAULT_MICRO_BATCH[device_type()]:
            for stage in config.zero_stages:
                group = [
                    Setting(name, micro_batch, stage, checkpointing, compiled)
                    for checkpointing in config.checkpointing.split(",")
                    for compiled in compiles
                ]
                if config.peer and not rope:
                    group.append(Setting(name, micro_batch, stage, encoder="transformers"))
                groups.append(group)
    for setting in (setting for group in groups for setting in group):
        options_of(setting)
    return groups


DEFAULT_PRESET = {"cpu": "vit_ti", "cuda": "vit_l14"}
DEFAULT_MICRO_BATCH = {"cpu": (32,), "cuda": (256,)}
DEFAULT_CLASSES = {"cpu": 10_000, "cuda": 1_000_000}


def device_type() -> str:
    """What this machine measures on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def options_of(setting: Setting) -> EncoderOptions:
    """train.py's flags for a setting. Raises ConfigError where checkpointing is none of its values."""
    try:
        layers = None if setting.checkpointing == "none" else setting.checkpointing
        return EncoderOptions(checkpoint_layers=layers, compile=setting.compile)
    except ValueError:
        raise ConfigError(
            f"--checkpointing {setting.checkpointing!r}: expected none, all, selective or a number, joined by commas"
        ) from None


class TransformersEncoder(nn.Module):
    """transformers' CLIPVisionModelWithProjection with its scaled_dot_product_attention, as TrainEngine wants a model."""

    dropping = None

    def __init__(self, config: VitConfig):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        there = config_there(config, "float32")
        names = ("architectures", "model_type", "torch_dtype")
        kept = {name: value for name, value in there.items() if name not in names}
        self.config, self.depth = config, config.layers
        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**kept, attn_implementation="sdpa"))

    def first_weights(self) -> list[nn.Parameter]:
        """The patches' weight."""
        return [weight for name, weight in self.named_parameters() if name.endswith("patch_embedding.weight")]

    def set_checkpointing(self, runner: BlockRunner | None, blocks: int | None = None) -> None:
        """It is measured without."""
        raise NotImplementedError

    def copy_weights(self, ours: VisionTransformer) -> "TransformersEncoder":
        """Takes over the weights of ours."""
        from mlcd_ds.models.hf import tensors_there

        tensors = tensors_there(self.config, ours.state_dict())
        own = set(self.model.state_dict())
        if not own & set(tensors):  # without the prefix in some versions of transformers
            tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        if unexpected or any("position_ids" not in name for name in missing):
            raise RuntimeError(f"transformers' CLIP has other weights than expected: {missing[:2]}, {unexpected[:2]}")
        return self

    def forward(self, images_B3HH: torch.Tensor) -> torch.Tensor:
        """[B, E], of uint8 images."""
        weight = self.first_weights()[0]
        return self.model(normalised(images_B3HH).to(weight.dtype)).image_embeds


class Step:
    """An engine with its data, and one optimizer step of it.

    The images are the same for all settings of a shape, with random distinct labels.
    """

    def __init__(self, setting: Setting, config: BenchStepConfig, topology: Topology):
        self.setting, self.topology = setting, topology
        self.encoder = preset(setting.preset, config.image_size)
        classes = config.classes or DEFAULT_CLASSES[topology.device.type]
        raw = {
            "train_batch_size": setting.micro_batch * topology.world_size,
            "train_micro_batch_size_per_gpu": setting.micro_batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.2, "torch_adam": True}},
            "zero_optimization": {"stage": setting.zero_stage},
        }
        if (
            topology.device.type == "cpu"
        ):  # as in cpu.json: the usual buckets would be most of the memory of small encoders
            raw["zero_optimization"] |= {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
        if self.precision(config) == "bfloat16":
            raw |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        self.settings = resolve_deepspeed_config(
            raw,
            batch=BatchSizes.resolve(raw, topology.world_size),
            total_steps=1_000_000,
            warmup_steps=1000,
            output_dir=".",
            device_type=topology.device.type,
            defaults=DeepSpeedDefaults(),
        )
        ours = VisionTransformer(self.encoder, seed=config.seed)
        model = ours if setting.encoder == "ours" else TransformersEncoder(self.encoder).copy_weights(ours)
        head_config = HeadConfig(sample_rate=config.sample_rate, num_positives=config.labels_per_image)
        head = PartialFC(
            classes,
            self.encoder.embed_dim,
            topology,
            sample_rate=config.sample_rate,
            seed=config.seed,
            precision=self.settings.precision if topology.device.type == "cuda" else "float32",
        )
        timeout_minutes = 60.0
        self.engine = TrainEngine(
            model, [head], self.settings, head_config, topology, timeout_minutes, options_of(setting)
        )
        self.fake = fake_batch(self.encoder.image_size, setting.micro_batch, classes, config, topology.rank)
        if topology.device.type == "cuda":
            self.fake = self.fake.pin_memory()
        self.steps = 0

    @staticmethod
    def precision(config: BenchStepConfig) -> str:
        """Dtype's name."""
        return config.precision or {"cuda": "bfloat16", "cpu": "float32"}[device_type()]

    def run(self, batch: ImageLabelBatch | None = None, next_batch: ImageLabelBatch | None = None) -> float:
        """One optimizer step; its loss. Without a batch the fake one, whose classes the step before has sampled."""
        batch, next_batch = (self.fake, self.fake) if batch is None else (batch, next_batch)
        result = self.engine.train_step(batch, self.steps, next_batch=next_batch)
        self.steps += 1
        return result.loss

    def head_share(self) -> float:
        """Of the time of a step, by the phases of COUNTED_STEPS."""
        self.engine.clock.start(HEAD)
        for _ in range(COUNTED_STEPS):
            self.run()
        seconds = self.engine.clock.stop()
        return seconds[HEAD] / sum(seconds.values())


def fake_batch(image_size: int, images: int, classes: int, config: BenchStepConfig, rank: int = 0) -> ImageLabelBatch:
    """Random pixels and random distinct labels, others on each rank."""
    generator = torch.Generator().manual_seed(config.seed + rank)
    pixels = torch.randint(0, 256, (images, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    width = classes // config.labels_per_image
    first_L = torch.arange(config.labels_per_image) * width
    labels = first_L + torch.randint(width, (images, config.labels_per_image), generator=generator)
    return ImageLabelBatch(pixels, labels, tuple(str(index) for index in range(images)))


def bench_step(config: BenchStepConfig) -> dict:
    """Measures what `config` asks for, prints a table, returns (and writes to config.output) all numbers."""
    groups = settings_of(config)
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise ConfigError(f"--output {config.output}: its folder does not exist")
    if (config.shards is None) != (config.labels is None):
        raise ConfigError("--shards and --labels belong together: give both, or neither for toy images made on the way")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    topology = Topology.from_environment()
    if topology.world_size > 1:
        check_several(config)
    topology.start(timeout_minutes=60.0)
    device = topology.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    result = {
        "command": command_line("step", config),
        "device": f"{device.type}, {name}",
        "ranks": topology.world_size,
        "threads": torch.get_num_threads(),
        "precision": Step.precision(config),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "classes": config.classes or DEFAULT_CLASSES[device.type],
        "sample_rate": config.sample_rate,
        "steps": [],
        "data": [],
    }
    if topology.is_main:
        print(
            f"steps on {result['device']}, {topology.world_size} ranks, {result['threads']} threads each, "
            f"{result['precision']}, torch {torch.__version__}"
        )

    def keep(part: str, rows: list[dict]) -> None:
        """After each group: what has been measured outlives what comes."""
        result[part] += rows
        if config.output is not None and topology.is_main:
            write_json(Path(config.output), result)

    for group in groups:
        if config.compile_cache is not None:
            topology.use_compile_cache(config.compile_cache)
        steps = [Step(setting, config, topology) for setting in group]
        keep("steps", time_group(steps, config))
        if config.data == "real":
            keep("data", [time_real_data(steps[0], config)])
        del steps
        torch._dynamo.reset()  # the next shape's graphs do not count against this one's
    if config.memory:
        for row, setting in zip(result["steps"], (setting for group in groups for setting in group), strict=True):
            if row["peak_bytes"] is None:
                print(f"{setting}: memory", flush=True)
                row["peak_bytes"] = in_processes(1, memory_on_rank, config, setting)
                keep("steps", [])
    if topology.is_main:
        print(step_table(result["steps"]))
    if result["data"] and topology.is_main:
        print(
            table(
                [
                    {name: f"{x:.3g}" if isinstance(x, float) else str(x) for name, x in r.items()}
                    for r in result["data"]
                ]
            )
        )
    topology.stop()
    return result


def check_several(config: BenchStepConfig) -> None:
    """Raises ConfigError for what is measured on one rank alone."""
    if config.memory:
        raise ConfigError("--memory is measured on one rank: leave it out, or leave the launcher out")
    if config.data == "real" and config.shards is None:
        raise ConfigError(
            "--data real with several ranks needs --shards and --labels: toy scenes are made for one rank"
        )


def time_group(steps: list[Step], config: BenchStepConfig) -> list[dict]:
    """A row for each step, all run in turn with the bare product."""
    device, topology = steps[0].topology.device, steps[0].topology

    def say(what: str) -> None:
        if topology.is_main:
            print(f"{steps[0].setting.preset}: {what}", flush=True)

    say("first steps, compilation")
    first = {str(step.setting): step.run() for step in steps}
    reference = first[str(steps[0].setting)]
    for name, loss in first.items():
        if not abs(loss / reference - 1) <= LOSS_TOLERANCE[Step.precision(config)]:
            raise RuntimeError(f"{name}: the first loss is {loss:.6f}, that of {steps[0].setting} {reference:.6f}")
    peaks = {
        str(step.setting): peak_bytes(step.run, device) + torch.cuda.memory_allocated(device) // len(steps)
        for step in steps
        if device.type == "cuda"
    }
    dtype = getattr(torch, Step.precision(config))
    contenders: dict[str, Contender] = {str(step.setting): step.run for step in steps}
    contenders["product"] = bare_cube(device, dtype, SIDE[device.type])
    seconds = time_in_turn(contenders, config.repeats, topology, say)
    measured = 2 * SIDE[device.type] ** 3 / seconds["product"]["min"]
    peak = measured if config.peak_tflops is None else config.peak_tflops * 1e12
    peers = [str(step.setting) for step in steps if step.setting.encoder != "ours"]
    rows = []
    for step in steps:
        own = seconds[str(step.setting)]
        work = flops.total(step.encoder).flops * step.setting.micro_batch  # of a rank
        rows.append(
            {
                "setting": str(step.setting),
                **asdict(step.setting),
                "image_size": step.encoder.image_size,
                "seconds": own,
                "images_per_second": step.setting.micro_batch * topology.world_size / own["min"],
                "encoder_flops": work,
                "peak_flops_per_second": peak,
                "mfu": work / own["min"] / peak,
                "head_share": step.head_share(),
                "peak_bytes": peaks.get(str(step.setting)),
                "first_loss": first[str(step.setting)],
                "per_transformers": seconds[peers[0]]["min"] / own["min"] if peers else None,
                "per_transformers_median": seconds[peers[0]]["median"] / own["median"] if peers else None,
                "compiled": cache_counts() if step.setting.compile else None,
            }
        )
    return rows


def memory_on_rank(rank: int, config: BenchStepConfig, setting: Setting, folder: Path) -> int:
    """In a fresh process: a step of one image that loads libraries, then the peak of a real one, second of its kind.

    Weights, moments and centers are in place by then: what is measured is what a step takes beyond them.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    topology = Topology.single(device_type()).start(timeout_minutes=60.0)
    Step(replace(setting, micro_batch=1), config, topology).run()
    step = Step(setting, config, topology)
    step.run()
    return peak_bytes(step.run, topology.device)


# --- real data ------------------------------------------------------------------------------------------------------


def time_real_data(step: Step, config: BenchStepConfig) -> dict:
    """The first setting's steps with images from tars, against as many with fake ones, in turns."""
    micro_batch, device = step.setting.micro_batch, step.topology.device
    with TemporaryDirectory() as folder:
        batches = real_batches(step, config, Path(folder))
        upcoming = next(batches)
        seconds = {"real": 0.0, "fake": 0.0}
        waited = 0.0
        for turn in range(-1, config.repeats):  # the first is not counted
            for kind in ("fake", "real"):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                started, in_wait = time.perf_counter(), 0.0
                for _ in range(config.real_steps):
                    if kind == "fake":
                        step.run()
                        continue
                    asked = time.perf_counter()
                    batch, upcoming = upcoming, next(batches)
                    in_wait += time.perf_counter() - asked
                    step.run(batch, upcoming)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 0:
                    seconds[kind] += time.perf_counter() - started
                    waited += in_wait
    steps, images = config.repeats * config.real_steps, micro_batch * step.topology.world_size
    return {
        "setting": str(step.setting),
        "steps": steps,
        "workers": config.workers,
        "real_images_per_second": steps * images / seconds["real"],
        "fake_images_per_second": steps * images / seconds["fake"],
        "real_per_fake": seconds["fake"] / seconds["real"],
        "waited_share": waited / seconds["real"],
    }


def real_batches(step: Step, config: BenchStepConfig, folder: Path) -> Iterator[ImageLabelBatch]:
    """Batches by the loader: of --shards, or of toy scenes made in `folder`, with random labels."""
    classes = step.engine.heads[0].partition.num_classes
    images = 8 * step.setting.micro_batch
    if config.shards is None:
        size = max(32, step.encoder.image_size)
        toys = ToyShardsConfig(
            output_dir=str(folder / "toy"), num_train=images, num_test=1, images_per_shard=images // 4, image_size=size
        )
        write_toy_shards(toys)
        shards = sorted(map(str, (folder / "toy" / "train").glob("*.tar")))
        labels = folder / "labels"
        info = LabelsInfo(classes, config.labels_per_image, "none", "none")
        for shard in shards:
            keys = find_index(shard).index.keys
            rows = np.random.default_rng(config.seed).integers(0, classes, (len(keys), config.labels_per_image))
            write_label_shard(label_path(labels, Path(shard).stem), keys, rows, np.zeros(rows.shape), info)
    else:
        shards, labels = expand_shards(config.shards), Path(config.labels)
    run = RunConfig(
        deepspeed_config="-",
        shards="-",
        labels="-",
        output_dir="-",
        workers=config.workers,
        num_positives=config.labels_per_image,
    )
    found = build_shard_table(shards, [labels], config.labels_per_image, 1.0, None, step.topology)
    if found.labels_infos[0].num_classes > classes:
        raise ConfigError(f"--classes {classes}: the labels in {labels} name {found.labels_infos[0].num_classes}")
    plan = EpochPlan(config.seed, found.counts, step.setting.micro_batch * step.topology.world_size, run.shuffle_window)
    loader = ImageLabelLoader(run, found, plan, step.encoder.image_size, step.topology)
    return loader.iterate(0, (config.repeats + 1) * config.real_steps + 1)


def step_table(rows: list[dict]) -> str:
    """A line for each setting."""
    lines = []
    for row in rows:
        peer, peak = row["per_transformers"], row["peak_bytes"]
        lines.append(
            {
                "setting": row["setting"],
                "ms": f"{row['seconds']['min'] * 1e3:.1f}",
                "(median)": f"{row['seconds']['median'] * 1e3:.1f}",
                "images/s": f"{row['images_per_second']:.1f}",
                "MFU": f"{row['mfu']:.1%}",
                "head": f"{row['head_share']:.1%}",
                "times transformers": "-" if peer is None else f"{peer:.2f}",
                "(of medians)": "-" if peer is None else f"{row['per_transformers_median']:.2f}",
                "peak MB": "-" if peak is None else f"{peak / 2**20:.0f}",
            }
        )
    return table(lines)
