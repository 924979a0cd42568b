"""Runs on captions: the processes of test_contrastive_runs.py.

First the engine alone, at several ZeRO stages and numbers of ranks, from one checkpoint to another; then train.py, killed
and resumed. Ranks are forks of this process, which has imported all that they need.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import deepspeed
import forked_runs
import torch
from engine_worker import ENCODER, IMAGES, own_part
from processes import free_port

from mlcd_ds import collectives, soak
from mlcd_ds.batch import NO_IMAGE, ImageLabelBatch
from mlcd_ds.checkpoint import Checkpoint
from mlcd_ds.config import DeepSpeedDefaults, RunConfig
from mlcd_ds.contrastive_engine import ContrastiveEngine
from mlcd_ds.data.tokenizer import CaptionTokenizer
from mlcd_ds.ds_config import BatchSizes, resolve_deepspeed_config
from mlcd_ds.models.text import ImageTextModel, TextConfig, TextTransformer
from mlcd_ds.models.vit import VisionTransformer
from mlcd_ds.topology import Topology

TEXT = TextConfig(
    layers=2, width=16, heads=2, mlp_width=32, embed_dim=8, activation="gelu", norm_eps=1e-5, context=6, vocabulary=20,
    end_token=19,
)  # fmt: skip
MISSING = (4, 11)
COMBINATIONS = {
    2: [(0, 1, False), (1, 3, False), (2, 1, True), (3, 3, False), (3, 3, True)],
    1: [(1, 1, False), (1, 4, True)],
}
"""{ranks: [(ZeRO stage, accumulation, locked)]}."""
CHAINS = {"both": ((2, 1, False), (1, 2, False)), "locked": ((2, 3, True), (1, 1, True))}
"""{name: ((ranks, ZeRO stage, locked) of two acts, the second of which goes on with the first's checkpoint)}."""


def towers(locked: bool) -> ImageTextModel:
    return ImageTextModel(VisionTransformer(ENCODER, seed=1), TextTransformer(TEXT, seed=2), locked)


def pairs(step: int = 0) -> ImageLabelBatch:
    """The same 12 images and texts for every number of ranks; rows in MISSING are no pair."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (IMAGES, 3, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, 19, (IMAGES, 6), generator=generator)
    tokens[:, -1] = tokens[::2, 3] = 19
    tokens[list(MISSING)] = NO_IMAGE
    return ImageLabelBatch(images, tokens, tuple("" for _ in range(IMAGES)))


def build(topology: Topology, stage: int, accumulation: int, locked: bool, **json) -> ContrastiveEngine:
    raw = json | {
        "train_batch_size": IMAGES,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1e9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
        **({"activation_checkpointing": {}} if stage == 1 else {}),
    }
    settings = resolve_deepspeed_config(
        raw,
        batch=BatchSizes.resolve(raw, topology.world_size),
        total_steps=10,
        warmup_steps=0,
        output_dir=".",
        device_type="cpu",
        defaults=DeepSpeedDefaults(),
    )
    paths = {"deepspeed_config": "x", "shards": "x", "output_dir": "x"}
    config = RunConfig(objective="clip", tokenizer="x", text_model="text_toy", **paths)
    return ContrastiveEngine(towers(locked), CaptionTokenizer("{}"), settings, config, topology, 1.0)


def captured_step(engine: ContrastiveEngine, batch: ImageLabelBatch) -> dict:
    """One train_step; the gradients as they stood just before the towers moved."""
    step, gradients = engine.engine.step, {}

    def capture():
        if engine.engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.engine.module.named_parameters():
                if parameter.requires_grad:
                    gradients[name] = deepspeed.utils.safe_get_full_grad(parameter).clone()
        step()

    engine.engine.step = capture
    result = engine.train_step(batch, 0, collect_stats=True, stop_wanted=lambda: engine.topology.is_main)
    engine.engine.step = step
    has_state = [name for name, p in engine.engine.module.image.named_parameters() if p.grad is not None]
    return {
        "gradients": gradients,
        "loss": result.loss,
        "stop_ranks": result.stop_ranks,
        "stats": result.stats,
        "image_gradients": has_state,
    }


def bad_step(engine: ContrastiveEngine, batch: ImageLabelBatch) -> dict:
    """The last rank's texts are no numbers: nothing may move, on any rank."""
    before = whole(engine)
    is_bad = engine.topology.rank == engine.topology.world_size - 1
    hook = engine.engine.module.text.projection.register_forward_hook(lambda *x: x[2] * torch.nan) if is_bad else None
    result = engine.train_step(batch, 1)
    if hook is not None:
        hook.remove()
    after = whole(engine)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return {"applied": result.applied, "bad": (result.bad, result.bad_ranks), "moved": moved}


def engine_acts(topology: Topology, folder: Path) -> None:
    found = {}
    for combination in COMBINATIONS[topology.world_size]:
        engine = build(topology, *combination)
        found[str(combination)] = captured_step(engine, own_part(pairs(), topology))
        if combination in ((0, 1, False), (3, 3, False)):
            found[f"bad {combination}"] = bad_step(engine, own_part(pairs(), topology))
    if topology.world_size == 2:
        for locked in (False, True):
            engine = build(topology, 2, 1, locked, bf16={"enabled": True})
            before = whole(engine)
            results = [engine.train_step(own_part(pairs(), topology), step) for step in range(2)]
            after = whole(engine)
            found[f"bf16 {locked}"] = {
                "losses": [result.loss for result in results],
                "applied": [result.applied for result in results],
                "moved": [name for name in before if not torch.equal(before[name], after[name])],
            }
        save(engine, topology, folder / "bf16")
    for name, acts in CHAINS.items():
        for number, (ranks, stage, locked) in enumerate(acts):
            if ranks == topology.world_size:
                found[f"{name} {number}"] = chain_act(topology, folder / name, number, stage, locked)
    torch.save(found, folder / f"engine{topology.world_size}_rank{topology.rank}.pt")


def chain_act(topology: Topology, folder: Path, number: int, stage: int, locked: bool) -> dict:
    """Loads the checkpoint of the act before, takes two steps with a save between them."""
    engine = build(topology, stage, 1, locked)
    loaded = None
    if number:
        engine.load(Checkpoint(folder, 1, {"world_size": 2, "zero_stage": CHAINS[folder.name][0][1]}), seed=0)
        loaded = whole(engine)
    losses = [engine.train_step(own_part(pairs(number), topology), number).loss]
    if not number:
        save(engine, topology, folder)
    saved = whole(engine)
    losses.append(engine.train_step(own_part(pairs(number + 1), topology), number + 1).loss)
    return {"loaded": loaded, "losses": losses, "saved": saved}


def whole(engine: ContrastiveEngine) -> dict[str, torch.Tensor]:
    """Copies of the weights: in float32 below stage 3 the engine hands out its own, which the next step moves."""
    return {name: tensor.clone() for name, tensor in engine.encoder_weights().items()}


def save(engine: ContrastiveEngine, topology: Topology, folder: Path) -> None:
    if topology.is_main:
        (folder / "ranks").mkdir(parents=True)
    collectives.barrier(topology)
    engine.save(folder, "tiny")


def engine_rank(rank: int, world_size: int, port: int, folder: Path) -> None:
    Topology.enter_rank(rank, world_size, port)
    topology = Topology.from_environment().start(timeout_minutes=1.0)
    engine_acts(topology, folder)
    topology.stop()


def main(folder: Path) -> None:
    soak.import_ahead()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for world_size in (2, 1):
        port = free_port()
        ranks = [context.Process(target=engine_rank, args=(r, world_size, port, folder)) for r in range(world_size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert all(rank.exitcode == 0 for rank in ranks), [rank.exitcode for rank in ranks]
    os.environ["DS_ACCELERATOR"] = "cpu"
    forked_runs.main(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
