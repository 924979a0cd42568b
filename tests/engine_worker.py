"""One rank of test_engine.py: gradients that reach encoder and head through DeepSpeed, for every ZeRO stage."""

import math
import sys
from pathlib import Path

import deepspeed
import torch

from mlcd_ds.averaging import WeightAverage
from mlcd_ds.batch import NO_IMAGE, ImageLabelBatch, head_suffix
from mlcd_ds.config import DeepSpeedDefaults, EncoderOptions, HeadConfig
from mlcd_ds.ds_config import BatchSizes, resolve_deepspeed_config
from mlcd_ds.engine import TrainEngine
from mlcd_ds.models.vit import VisionTransformer, VitConfig
from mlcd_ds.partial_fc import PartialFC
from mlcd_ds.topology import Topology

IMAGES, CLASSES = 12, 37
STEPS, EPS, SAMPLE_RATE = 3, 1e-2, 0.3
"""Of the sampled run; eps far above rounding, so that AdamW's first steps do not blow it up."""
TWO_HEADS, TWO_WEIGHTS = (CLASSES, 23), (1.0, 0.5)
ENCODER = VitConfig(
    image_size=16, patch_size=8, layers=2, width=16, heads=2, mlp_width=32, embed_dim=8, rope=False, activation="gelu",
    norm_eps=1e-5,
)  # fmt: skip


def global_batch(missing: tuple[int, ...] = (), classes: tuple[int, ...] = (CLASSES,)) -> ImageLabelBatch:
    """The same 12 images for every number of ranks; rows in `missing` are no image. classes: of each head."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.cat([torch.randint(0, k, (IMAGES, 4), generator=generator) for k in classes], dim=1)
    for row in missing:
        labels[row] = NO_IMAGE
    return ImageLabelBatch(images, labels, tuple("" for _ in range(IMAGES)))


def config(**options) -> HeadConfig:
    return HeadConfig(**({"sample_rate": 1.0, "head_grad_clip": 0.0} | options))


def build(
    topology: Topology,
    stage: int,
    accumulation: int,
    checkpointing: bool,
    options: dict,
    classes=(CLASSES,),
    eps: float = 1e-8,
    model: VisionTransformer | None = None,
    encoder: EncoderOptions | None = None,
    **json,
) -> TrainEngine:
    """json: more keys of the DeepSpeed JSON. model: in place of ENCODER's. encoder: its options."""
    raw = json | {
        "train_batch_size": IMAGES,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1e9,  # finite, so that the norm is computed, and never reached
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": eps, "weight_decay": 0.1, "torch_adam": True}},
        **({"activation_checkpointing": {}} if checkpointing else {}),
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
    head_config = config(**options)
    heads = [
        PartialFC(k, 8, topology, sample_rate=head_config.sample_rate, workspace_mb=1e-4, seed=1 + index)
        for index, k in enumerate(classes)
    ]
    model = model or VisionTransformer(ENCODER, seed=1)
    return TrainEngine(model, heads, settings, head_config, topology, 1.0, encoder)


def captured_step(engine: TrainEngine, batch: ImageLabelBatch, step: int = 0) -> dict:
    """One train_step; the gradients as they stood just before encoder and heads moved.

    Those of the heads after the first end in "_1" ...
    """
    (head, *others), deepspeed_step = engine.heads, engine.engine.step
    captured = {"centers_before": head.centers.detach().clone()}
    if others:
        captured["centers_before_1"] = others[0].centers.detach().clone()

    def capture_encoder():
        if engine.engine.is_gradient_accumulation_boundary():
            named = engine.engine.module.named_parameters()
            captured["encoder"] = {
                name: deepspeed.utils.safe_get_full_grad(parameter).clone() for name, parameter in named
            }
        deepspeed_step()
        captured["centers_after_engine"] = head.centers.detach().clone()

    def capturing(name, optimizer, head_step):
        def capture_head(gradient, learning_rate, step):
            dense = torch.zeros_like(optimizer.centers_cD)
            dense[gradient.rows_S] = gradient.values_SD
            captured[name] = dense
            head_step(gradient, learning_rate, step)

        return capture_head

    engine.engine.step = capture_encoder
    for index, optimizer in enumerate(engine.head_optimizers):
        optimizer.step = capturing(f"centers{head_suffix(index)}", optimizer, optimizer.step)
    result = engine.train_step(batch, step)
    engine.engine.step = deepspeed_step
    for optimizer in engine.head_optimizers:
        del optimizer.step  # the class's own again
    captured |= {"loss": result.loss, "grad_norm": result.grad_norm, "head_norm": result.head_grad_norms[0]}
    if others:
        captured["head_norm_1"] = result.head_grad_norms[1]
    return captured | {"applied": result.applied, "learning_rates": (result.learning_rate, result.head_learning_rate)}


def own_part(batch: ImageLabelBatch, topology: Topology) -> ImageLabelBatch:
    return batch.split(IMAGES // topology.world_size)[topology.rank]


def batch_of_step(step: int) -> ImageLabelBatch:
    """Other images at each step, one of them missing in the second."""
    batch = global_batch(missing=(4,) if step == 1 else ())
    order = torch.arange(IMAGES).roll(5 * step)
    labels = torch.where(batch.labels_BL >= 0, (batch.labels_BL + 11 * step) % CLASSES, batch.labels_BL)
    return ImageLabelBatch(batch.images_BCHH[order], labels[order], batch.keys)


def sampled_run(topology: Topology, ahead: bool) -> dict:
    """STEPS steps of three micro-batches at a sample rate below one; ahead: each sampled in the step before."""
    options = {"sample_rate": SAMPLE_RATE, "head_lr_scale": 2.0}
    engine = build(topology, 1, 3, False, options, eps=EPS)
    batches = [own_part(batch_of_step(step), topology) for step in range(STEPS)]
    results, marked, mark = [], [], engine._mark

    def counting(batch, step):
        marked.append((step, during))
        return mark(batch, step)

    engine._mark = counting
    for step, batch in enumerate(batches):
        following, during = batches[step + 1] if ahead and step + 1 < STEPS else None, step
        results.append(engine.train_step(batch, step, next_batch=following))
    return {
        "losses": [result.loss for result in results],
        "learning_rates": [result.learning_rate for result in results],
        "head_norms": [result.head_grad_norms[0] for result in results],
        "betas": engine.settings.betas,
        "marked": marked,
        "encoder": engine.encoder_weights(),
        "centers": engine.heads[0].centers.detach().clone(),
        **engine.head_optimizers[0].state_dict(),
    }


BAD = ("embeddings", "gradient", "head")
"""What a bad step breaks: an image's way through the encoder, the way back, the gradient of the last head's centers."""
BAD_COMBINATIONS = {
    1: [(1, 1, "float32")],
    2: [*((stage, 3, "float32") for stage in range(4)), *((stage, 1, "bfloat16") for stage in range(4))],
}
"""{ranks: [(stage, accumulation, precision)]}; bfloat16 has optimizers of its own at stages 0 and 1."""


def bad_step(engine: TrainEngine, batch: ImageLabelBatch, topology: Topology, what: str) -> dict:
    """A step in which something is no number, on the last rank alone: nothing may move, on any rank."""
    is_bad = topology.rank == topology.world_size - 1
    weights, moments = engine.encoder_weights(), [dict(o.state_dict()) for o in engine.head_optimizers]
    before = {f"{h}{name}": x.clone() for h, state in enumerate(moments) for name, x in state.items()}
    before |= {f"centers{h}": head.centers.detach().clone() for h, head in enumerate(engine.heads)}
    module, take = engine.engine.module, engine.heads[-1].take_gradients

    def spoil_output(module, inputs, output):
        if what == "embeddings":
            return output * torch.nan
        output.register_hook(lambda gradient: gradient * torch.nan)

    def spoil_rows():
        gradients = take()
        if gradients:
            gradients[0].values_SD[0, 0] = torch.inf
        return gradients

    handle = None
    if is_bad and what == "head":
        engine.heads[-1].take_gradients = spoil_rows
    elif is_bad:
        handle = module.embeddings.patch.register_forward_hook(spoil_output)
    result = engine.train_step(batch, step=1, stop_wanted=lambda: topology.rank == 0)
    if handle is not None:
        handle.remove()
    vars(engine.heads[-1]).pop("take_gradients", None)
    after = engine.encoder_weights()
    moments = [dict(o.state_dict()) for o in engine.head_optimizers]
    now = {f"{h}{name}": x for h, state in enumerate(moments) for name, x in state.items()}
    now |= {f"centers{h}": head.centers.detach() for h, head in enumerate(engine.heads)}
    moved = [name for name in weights if not torch.equal(weights[name], after[name])]
    moved += [name for name in before if not torch.equal(before[name], now[name])]
    return {
        "applied": result.applied,
        "bad": (result.bad, result.bad_ranks),
        "stop_ranks": result.stop_ranks,
        "moved": moved,
        "finite": (math.isfinite(result.loss), math.isfinite(result.head_grad_norms[-1])),
    }


class WatchedAverage:
    """A run's moving average as the engine's pieces give it, beside one of the whole float32 weights."""

    def __init__(self, engine: TrainEngine, decay: float):
        self.engine, self.average = engine, WeightAverage(decay, engine.local_weights(), engine.trained_shapes())
        self.whole = self._weights()

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.double() for name, weight in self.engine.encoder_weights().items()}

    def update(self) -> None:
        self.average.update(self.engine.local_weights())
        decay = self.average.decay
        self.whole = {name: decay * self.whole[name] + (1 - decay) * now for name, now in self._weights().items()}

    def error(self, topology: Topology) -> float:
        """Largest difference, as a share of how far the averages are from the weights."""
        found, now = self.average.whole(topology), self._weights()
        assert set(found) == set(self.whole)
        way = max((self.whole[name] - now[name]).abs().max().item() for name in now)
        return max((found[name].double() - self.whole[name]).abs().max().item() for name in now) / way


def steps_with_bad_ones(topology: Topology, stage: int, accumulation: int, precision: str) -> dict:
    """Good steps with bad ones between them, and a twin without: the good ones must be the same, bit for bit."""
    schedule = {"total_num_steps": 10, "warmup_num_steps": 2, "warmup_type": "linear"}
    json = {"scheduler": {"type": "WarmupCosineLR", "params": schedule}}
    if precision == "bfloat16":
        json["bf16"] = {"enabled": True}
    found: dict = {}
    ends = []
    for has_bad in (True, False):
        engine = build(topology, stage, accumulation, False, {"sample_rate": SAMPLE_RATE}, **json)
        learning_rates, average = [], WatchedAverage(engine, 0.9)
        for step in (0, 2, 3, 4):
            batch = own_part(batch_of_step(step), topology)
            result = engine.train_step(batch, step)
            average.update()
            learning_rates.append(result.learning_rate)
            if has_bad and step == 2:
                found |= {what: bad_step(engine, batch, topology, what) for what in BAD}
                counts = (engine.skipped_steps, engine.engine.skipped_steps, engine.engine.global_steps)
                found["counts"], found["micro_steps"] = counts, engine.engine.micro_steps
        found["average_error"] = average.error(topology)
        weights, (head,) = engine.encoder_weights(), engine.heads
        found["finer"] = any((weight != weight.bfloat16()).any().item() for weight in weights.values())
        found["unlike"] = [
            name
            for name, p in engine.engine.module.named_parameters()
            if p.numel() and not torch.equal(weights[name].to(p.dtype), p.detach())
        ]  # at stage 3 there is nothing left of them between steps
        rest = {"centers": head.centers.detach(), "learning_rates": torch.tensor(learning_rates)}
        ends.append(weights | rest | engine.head_optimizers[0].state_dict())
    bad, good = ends
    found["differing"] = [name for name in good if not torch.equal(good[name], bad[name])]
    found["last_moved"] = max(rest.abs().max().item() for rest in (good["learning_rates"][1:],)) > 0
    return found


def main(folder: Path) -> None:
    topology = Topology.from_environment().start(timeout_minutes=1.0)
    results = {}
    for stage in (0, 1, 2, 3):
        for accumulation in (1, 3):
            engine = build(topology, stage, accumulation, checkpointing=stage == 1, options={"head_lr_scale": 2.0})
            results[f"{stage},{accumulation}"] = captured_step(engine, own_part(global_batch(), topology))
    results["sampled"] = sampled_run(topology, ahead=False)
    results["sampled ahead"] = sampled_run(topology, ahead=True)
    engine = build(topology, 1, 1, False, {})
    results["missing"] = captured_step(engine, own_part(global_batch(missing=(0, 7, 8)), topology))
    engine = build(topology, 1, 3, False, {})
    results["missing,3"] = captured_step(engine, own_part(global_batch(missing=(0, 1, 7)), topology))
    engine = build(topology, 1, 1, False, {"head_grad_clip": 0.5})
    results["clipped"] = captured_step(engine, own_part(global_batch(), topology))
    for accumulation in (1, 3):
        engine = build(topology, 1, accumulation, False, {"head_weights": TWO_WEIGHTS}, TWO_HEADS)
        batch = own_part(global_batch(missing=(0, 1, 7), classes=TWO_HEADS), topology)
        results[f"two heads,{accumulation}"] = captured_step(engine, batch)
    results["bad second head"] = bad_step(engine, batch, topology, "head")
    for combination in BAD_COMBINATIONS[topology.world_size]:
        results[f"bad,{combination}"] = steps_with_bad_ones(topology, *combination)
    engine = build(topology, 1, 1, False, {"head_weights": TWO_WEIGHTS, "head_grad_clip": 0.5}, TWO_HEADS)
    batch = own_part(global_batch(missing=(0, 1, 7), classes=TWO_HEADS), topology)
    results["two heads,clipped"] = captured_step(engine, batch)
    torch.save(results, folder / f"world{topology.world_size}_rank{topology.rank}.pt")
    topology.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
