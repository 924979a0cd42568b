"""DeepSpeed's engine around an image and a text tower that are trained on captions: the contrastive loss as one step.

The contrast is among all pairs of the step, those of every rank and of every micro-batch. So a step is the same function
whatever the number of ranks and however the global batch is cut: with several micro-batches, their embeddings are made
first, without gradients; the loss of all of them gives each embedding its gradient; then each micro-batch passes once more
and takes its own back (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").

Shapes: B pairs of this rank, T tokens, E embedding.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from mlcd_ds import checkpoint, collectives
from mlcd_ds.batch import NO_IMAGE, ImageLabelBatch
from mlcd_ds.config import RunConfig
from mlcd_ds.contrastive import contrast
from mlcd_ds.data.tokenizer import CaptionTokenizer
from mlcd_ds.ds_config import DeepSpeedSettings
from mlcd_ds.engine import Computed, TrainEngine
from mlcd_ds.models.text import ImageTextModel
from mlcd_ds.topology import Topology

IMAGE, TEXT = "image.", "text."


class ContrastiveEngine(TrainEngine):
    """Both towers and the temperature, trained together: a TrainEngine without heads. tokenizer: goes into checkpoints."""

    def __init__(
        self,
        model: ImageTextModel,
        tokenizer: CaptionTokenizer,
        settings: DeepSpeedSettings,
        config: RunConfig,
        topology: Topology,
        timeout_minutes: float,
    ):
        self.tokenizer, self.text_name = tokenizer, config.text_model
        # Nothing moves a locked tower. Its weights are kept as they came: the engine may hold them rounded or in parts.
        self._locked: dict[str, torch.Tensor] = {}
        if model.locked and topology.is_main:
            self._locked = {f"{IMAGE}{name}": tensor.clone() for name, tensor in model.image.state_dict().items()}
        super().__init__(model, [], settings, config, topology, timeout_minutes)

    def _compute(
        self,
        batch: ImageLabelBatch,
        step: int,
        collect_stats: bool,
        next_batch: ImageLabelBatch | None,
        stop_wanted: Callable[[], bool],
    ) -> Computed:
        micro_batches = batch.split(self.settings.micro_batch)
        several = len(micro_batches) > 1
        is_pair_B = (batch.labels_BL[:, 0] != NO_IMAGE).to(self.topology.device, non_blocking=True)
        with torch.set_grad_enabled(not several):
            outputs = [self._embed(micro) for micro in micro_batches]
        images_BE, texts_BE = (torch.cat([output[side].detach() for output in outputs]) for side in (0, 1))
        found = contrast(images_BE, texts_BE, outputs[0][2].detach(), is_pair_B, self.topology)
        sides = [found.d_images_bE, found.d_texts_bE]
        gradients = list(zip(*(side.split(self.settings.micro_batch) for side in sides), strict=True))
        for index, micro in enumerate(micro_batches):
            output = self._embed(micro, outputs[index][0]) if several else outputs[index]
            wanted = [*gradients[index], found.d_scale / len(micro_batches)]
            # Its gradient with respect to what the towers gave is `wanted`, once the engine has divided it.
            chained = sum((x * d_x).sum() for x, d_x in zip(output, wanted, strict=True) if x.requires_grad)
            self.engine.backward(chained * len(micro_batches))
            if index < len(micro_batches) - 1:
                self.engine.step()
        stop = torch.full((1,), float(stop_wanted()), device=self.topology.device)
        collectives.sum_(stop, self.topology)
        loss, stopping = torch.cat([found.loss[None].double(), stop.double()]).tolist()  # here the host waits
        broken = [~torch.isfinite(output[side].detach()).all() for output in outputs for side in (0, 1)]
        return Computed(loss, round(stopping), broken, found.stats if collect_stats else {})

    def _embed(self, micro: ImageLabelBatch, known_BE: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """What ImageTextModel gives for a micro-batch. known_BE: its image embeddings, which a locked tower has made."""
        device = self.topology.device
        tokens_BT = micro.labels_BL.to(device, non_blocking=True).clamp_min(0)  # rows without an image are any text
        images = known_BE if self.engine.module.locked and known_BE is not None else micro.images_BCHH
        return self.engine(images.to(device, non_blocking=True), tokens_BT)

    def encoder_weights(self) -> dict[str, torch.Tensor]:
        """Both towers' float32 weights on the CPU and the temperature, whole; a locked tower's on rank 0 alone."""
        return super().encoder_weights() | self._locked

    def _save_model(self, folder: Path, model_name: str, weights: dict[str, torch.Tensor]) -> None:
        model = self.engine.module
        image, text = _towers(weights)
        checkpoint.save_encoder(folder / "encoder", model_name, model.image.config, image)
        checkpoint.save_text(folder / "text", self.text_name, model.text.config, text, self.tokenizer)

    def _compare_model(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        image, text = _towers(weights)
        checkpoint.compare_weights(image, folder / "encoder" / "encoder.safetensors")
        checkpoint.compare_weights(text, folder / "text" / "text.safetensors")


def _towers(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The image tower's state dict, and the text tower's with the temperature."""
    image = {name.removeprefix(IMAGE): tensor for name, tensor in weights.items() if name.startswith(IMAGE)}
    text = {name.removeprefix(TEXT): tensor for name, tensor in weights.items() if not name.startswith(IMAGE)}
    return image, text
