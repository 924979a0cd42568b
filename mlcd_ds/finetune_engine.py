"""DeepSpeed's engine around an encoder with a classifier: mixed images against mixed targets as one step.

A micro-batch is mixed in itself, by numbers drawn from (seed, step, place of the micro-batch in the global batch): the same
for every number of ranks that cuts the batch into the same micro-batches.

Shapes: B images of this rank, b of a micro-batch, C classes, H height = width in pixels.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mlcd_ds import checkpoint, collectives
from mlcd_ds.averaging import WeightAverage
from mlcd_ds.batch import NO_IMAGE, ImageLabelBatch
from mlcd_ds.checkpoint import Checkpoint
from mlcd_ds.config import FinetuneConfig, RunConfig
from mlcd_ds.ds_config import DeepSpeedSettings
from mlcd_ds.engine import Computed, StepResult, TrainEngine
from mlcd_ds.models.classifier import ENCODER, HEAD, Classifier, layer_groups
from mlcd_ds.models.vit import VisionTransformer
from mlcd_ds.profiling import BACKWARD, FORWARD
from mlcd_ds.topology import Topology

AVERAGED = "averaged."
ENCODER_FILE = "encoder/encoder.safetensors"


def mix(
    images_b3HH: torch.Tensor, targets_bC: torch.Tensor, config: FinetuneConfig, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets, each with the one at the mirrored place of the micro-batch; uint8 images stay uint8.

    Mixup (Zhang et al. 2018, arXiv 1710.09412): lam of one and 1 - lam of the other, lam ~ Beta(alpha, alpha). CutMix
    (Yun et al. 2019, arXiv 1905.04899): a rectangle of 1 - lam of the area from the other, the targets by the pixels
    that it has within the image. Where both are on, each takes half of the micro-batches.
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(config, name) > 0]
    if not kinds or generator.random() >= config.mix_probability:
        return images_b3HH, targets_bC
    kind = kinds[int(generator.integers(len(kinds)))]
    alpha = config.mixup if kind == "mixup" else config.cutmix
    lam = float(generator.beta(alpha, alpha))
    others_b3HH = images_b3HH.flip(0)
    if kind == "mixup":
        mixed = images_b3HH.float().mul(lam).add(others_b3HH, alpha=1 - lam)
        images_b3HH = mixed.round().to(torch.uint8)  # half a grey level at most; the encoder normalises bytes
    else:
        top, bottom, left, right = _rectangle(images_b3HH.shape[-1], 1 - lam, generator)
        images_b3HH = images_b3HH.clone()
        images_b3HH[:, :, top:bottom, left:right] = others_b3HH[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / images_b3HH.shape[-1] ** 2
    return images_b3HH, targets_bC * lam + targets_bC.flip(0) * (1 - lam)


def _rectangle(size: int, share: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right): a square of `share` of the area round a random place, cut at the borders."""
    half = size * share**0.5 / 2
    y, x = generator.uniform(0, size, 2)
    edges = np.clip(np.round([y - half, y + half, x - half, x + half]), 0, size).astype(int)
    return tuple(edges.tolist())


def targets_of(labels_b: torch.Tensor, num_classes: int) -> torch.Tensor:
    """float32 [b, C], one where the class is; zeros for a row without an image (NO_IMAGE)."""
    known = labels_b != NO_IMAGE
    targets = torch.nn.functional.one_hot(labels_b.clamp_min(0), num_classes).float()
    return targets * known[:, None]


def soft_cross_entropy(logits_bC: torch.Tensor, targets_bC: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sum over the images of the cross entropy, in float32; `smoothing` of each target is spread over all classes."""
    smooth_bC = targets_bC * (1 - smoothing) + targets_bC.sum(1, keepdim=True) * (smoothing / targets_bC.shape[1])
    return -(smooth_bC * torch.log_softmax(logits_bC.float(), dim=1)).sum()


class FinetuneEngine(TrainEngine):
    """Encoder and classifier, trained together: a TrainEngine without class-sharded heads.

    average: of the weights after each step, where --ema_decay is given; else None.
    """

    def __init__(
        self,
        model: Classifier,
        settings: DeepSpeedSettings,
        config: FinetuneConfig,
        run: RunConfig,
        topology: Topology,
        timeout_minutes: float,
    ):
        self.finetune, self._smoothing = config, config.label_smoothing
        self.num_classes = model.head.out_features
        super().__init__(model, [], settings, run, topology, timeout_minutes)
        self.average: WeightAverage | None = None
        if config.ema_decay:
            self.average = WeightAverage(config.ema_decay, self.local_weights(), self.trained_shapes())

    def train_step(self, *arguments, **options) -> StepResult:
        """See `TrainEngine.train_step`. A step that was taken enters the average."""
        result = super().train_step(*arguments, **options)
        if self.average is not None and result.applied:
            self.average.update(self.local_weights())
        return result

    def _parameter_groups(self, model: Classifier) -> list[dict]:
        return layer_groups(model, self.settings.weight_decay, self.settings.learning_rate, self.finetune.layer_decay)

    def _compute(
        self,
        batch: ImageLabelBatch,
        step: int,
        collect_stats: bool,
        next_batch: ImageLabelBatch | None,
        stop_wanted: Callable[[], bool],
    ) -> Computed:
        micro_batches, device = batch.split(self.settings.micro_batch), self.topology.device
        counts = torch.tensor([float((batch.labels_BL[:, 0] != NO_IMAGE).sum()), float(stop_wanted())], device=device)
        images, stopping = collectives.sum_(counts, self.topology).tolist()
        # Each rank's mean over the accumulated passes is averaged over the ranks: so weighted, the loss is the mean over
        # all images of the step, however many of them each micro-batch has.
        weight = self.topology.world_size * len(micro_batches) / max(images, 1.0)
        losses, right, broken = [], [], []
        for index, micro in enumerate(micro_batches):
            self.clock.begin(FORWARD)
            labels_b = micro.labels_BL[:, 0].to(device, non_blocking=True)
            place = self.topology.rank * len(micro_batches) + index
            generator = np.random.default_rng([self.finetune.seed, 3, step, place])
            pixels = micro.images_BCHH.to(device, non_blocking=True)
            mixed, targets_bC = mix(pixels, targets_of(labels_b, self.num_classes), self.finetune, generator)
            logits_bC = self.engine(mixed, *self._visit(step, index))
            loss = soft_cross_entropy(logits_bC, targets_bC, self._smoothing)
            self.clock.begin(BACKWARD)
            self.engine.backward(loss * weight)
            losses.append(loss.detach())
            right.append((logits_bC.detach().argmax(1) == targets_bC.argmax(1))[labels_b != NO_IMAGE].sum())
            broken.append(~torch.isfinite(logits_bC.detach()).all())
            if index < len(micro_batches) - 1:
                self.engine.step()
        sums = torch.stack([torch.stack(losses).sum().double(), torch.stack(right).sum().double()])
        loss, hits = (collectives.sum_(sums, self.topology) / max(images, 1.0)).tolist()  # here the host waits
        stats = {"accuracy_mixed": torch.tensor(hits)} if collect_stats else {}
        return Computed(loss, round(stopping), broken, stats)

    @torch.no_grad()
    def logits(self, images_b3HH: torch.Tensor) -> torch.Tensor:
        """float32 [b, C] on the device, in evaluation mode. At ZeRO stage 3 every rank must call it equally often."""
        self.engine.eval()
        try:
            return self.engine(images_b3HH.to(self.topology.device, non_blocking=True)).float()
        finally:
            self.engine.train()

    def averaged(self) -> Classifier | None:
        """The averaged weights as a model of its own, whole, in the run's precision, in evaluation mode; None without an
        average. Every rank calls it. Its projection, which no logit depends on, is not the encoder's.
        """
        if self.average is None:
            return None
        model = Classifier(VisionTransformer(self.engine.module.encoder.config, seed=0), self.num_classes, seed=0)
        model.load_state_dict(model.state_dict() | self.average.whole(self.topology))
        return model.to(self.topology.device, getattr(torch, self.settings.precision)).eval()

    def encoder_weights(self) -> dict[str, torch.Tensor]:
        """See `TrainEngine.encoder_weights`; the average's besides, their names behind AVERAGED."""
        weights = super().encoder_weights()
        if self.average is None:
            return weights
        averaged = self.average.whole(self.topology) | self._frozen
        return weights | {f"{AVERAGED}{name}": tensor for name, tensor in averaged.items()}

    def load(self, found: Checkpoint, seed: int) -> None:
        """See `TrainEngine.load`. The average comes bit for bit, whatever number of ranks and ZeRO stage wrote it."""
        super().load(found, seed)
        if self.average is None:
            return
        folder = found.path / checkpoint.AVERAGE
        if folder.is_dir():
            self.average.load({folder / ENCODER_FILE: ENCODER, folder / checkpoint.CLASSIFIER: HEAD})
        else:  # --allow_changed ema_decay
            self.average.restart(self.local_weights())
            if self.topology.is_main:
                print(f"{found.path} has no averaged weights: the average begins at step {found.step}", flush=True)

    def _save_model(self, folder: Path, model_name: str, weights: dict[str, torch.Tensor]) -> None:
        places = {folder: "", folder / checkpoint.AVERAGE: AVERAGED} if self.average is not None else {folder: ""}
        for place, prefix in places.items():
            encoder, head = _parts(weights, prefix)
            checkpoint.save_encoder(place / "encoder", model_name, self.engine.module.encoder.config, encoder)
            checkpoint.save_classifier(place / checkpoint.CLASSIFIER, head)

    def _compare_model(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        encoder, head = _parts(weights)
        checkpoint.compare_weights(encoder, folder / ENCODER_FILE)
        checkpoint.compare_weights(head, folder / checkpoint.CLASSIFIER)


def _parts(
    weights: dict[str, torch.Tensor], prefix: str = ""
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The encoder's state dict, and the classifier's, of those names that begin with `prefix`."""
    encoder, head = (
        {name.removeprefix(prefix + part): tensor for name, tensor in weights.items() if name.startswith(prefix + part)}
        for part in (ENCODER, HEAD)
    )
    return encoder, head
