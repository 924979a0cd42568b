"""Peak memory of real training steps beside what is planned for them: the processes of test_step_plan.py.

PYTHONPATH=.:tests python tests/memory_worker.py [RESULT.json [CASE ...]] prints a line per case. DeepSpeed is imported once;
every case has ranks of its own, forked from here. A tiny run in each wakes the libraries before anything is counted.
"""

import ctypes
import json
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mlcd_ds import soak
from mlcd_ds.batch import ImageLabelBatch
from mlcd_ds.benchmarks.timing import peak_bytes
from mlcd_ds.config import DeepSpeedDefaults, RunConfig
from mlcd_ds.ds_config import BatchSizes, DeepSpeedSettings, resolve_deepspeed_config
from mlcd_ds.engine import TrainEngine
from mlcd_ds.memory import plan_memory
from mlcd_ds.models.vit import VisionTransformer, VitConfig, preset
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.topology import Topology

RANKS, STEPS = 2, 2


@dataclass(frozen=True)
class Case:
    """A training step of RANKS ranks in float32. micro_batch: images of a rank; accumulation: of them a step."""

    model: str
    num_classes: int
    micro_batch: int
    zero_stage: int
    accumulation: int = 1
    checkpointing: bool = False
    image_size: int | None = None

    @property
    def encoder(self) -> VitConfig:
        return preset(self.model, self.image_size)

    def settings(self) -> DeepSpeedSettings:
        zero = {"stage": self.zero_stage, "reduce_bucket_size": 2_000_000, "overlap_comm": False}
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0} if self.zero_stage == 3 else {}
        raw = {
            "train_batch_size": self.micro_batch * self.accumulation * RANKS,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
            **({"activation_checkpointing": {}} if self.checkpointing else {}),
        }
        return resolve_deepspeed_config(
            raw,
            batch=BatchSizes.resolve(raw, RANKS),
            total_steps=10,
            warmup_steps=0,
            output_dir=".",
            device_type="cpu",
            defaults=DeepSpeedDefaults(),
        )

    def config(self) -> RunConfig:
        return RunConfig(deepspeed_config="-", shards="-", labels="-", output_dir="-", model=self.model)


CASES = {
    f"{name}, ZeRO {stage}": Case(model, classes, batch, stage, image_size=pixels)
    for name, model, classes, batch, pixels in (
        ("activations", "vit_ti", 1_000, 128, None),
        ("head", "vit_s", 400_000, 16, None),
        ("weights", "vit_b32", 1_000, 4, 32),
    )
    for stage in (1, 3)
}
MORE = {
    "accumulation, ZeRO 1": Case("vit_s", 100_000, 16, 1, accumulation=3),
    "accumulation, ZeRO 2": Case("vit_s", 100_000, 16, 2, accumulation=3),
    "checkpointing, ZeRO 1": Case("vit_s", 1_000, 128, 1, checkpointing=True),
    "checkpointing, ZeRO 3": Case("vit_s", 1_000, 128, 3, checkpointing=True),
    "ZeRO 0": Case("vit_s", 20_000, 64, 0),
    "ZeRO 2": Case("vit_s", 20_000, 64, 2),
}


def train(case: Case, topology: Topology) -> None:
    """STEPS steps of an engine that is built for them."""
    settings, config = case.settings(), case.config()
    head = PartialFC(case.num_classes, case.encoder.embed_dim, topology, sample_rate=config.sample_rate)
    engine = TrainEngine(VisionTransformer(case.encoder, seed=0), [head], settings, config, topology, 5.0)
    size = case.encoder.image_size
    for step in range(STEPS):
        images = torch.randint(0, 256, (settings.images_per_rank, 3, size, size), dtype=torch.uint8)
        labels = torch.randint(0, case.num_classes, (settings.images_per_rank, config.num_positives))
        engine.train_step(ImageLabelBatch(images, labels, ("",) * len(images)), step)


def rank_process(rank: int, port: int, case: Case, queue) -> None:
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # memory above 256 kB is given back when freed, as that of real sizes is
    Topology.enter_rank(rank, RANKS, port)
    topology = Topology.from_environment().start(timeout_minutes=5.0)
    train(Case("vit_toy", 100, 2, case.zero_stage, case.accumulation, case.checkpointing), topology)
    peak = peak_bytes(lambda: train(case, topology), topology.device)
    topology.stop()
    if rank == 0:
        queue.put(peak)


def measure(case: Case) -> int:
    """Peak bytes of rank 0."""
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), soak._free_port()
    ranks = [context.Process(target=rank_process, args=(rank, port, case, queue)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert all(rank.exitcode == 0 for rank in ranks), case
    return queue.get(timeout=10)


def main(result: str = "", *names: str) -> None:
    torch.set_num_threads(1)
    soak.import_ahead()
    found = {}
    for name, case in (CASES | MORE).items():
        if name not in (names or CASES):
            continue
        plan = plan_memory(case.encoder, case.settings(), case.config(), (case.num_classes,), RANKS, device="cpu")
        found[name] = {"measured": measure(case), "planned": plan.total}
        parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in plan.parts.items())
        ratio = plan.total / found[name]["measured"]
        print(
            f"{name}: measured {found[name]['measured'] / 1e6:.0f} MB, planned {plan.total / 1e6:.0f}, {ratio:.3f}: {parts}",
            flush=True,
        )
    if result:
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
