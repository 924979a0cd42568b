"""An encoder with a linear classifier on its features, for fine-tuning: parameter groups whose learning rate falls with
depth.

Shapes: B images, H height = width in pixels, W the encoder's width, C classes.
"""

import torch
from torch import nn

from mlcd_ds.models.vit import BlockRunner, Dropping, VisionTransformer, Visit, decay_groups

ENCODER, HEAD = "encoder.", "head."
"""What the weights' names begin with."""
INITIAL_STD = 2e-5
"""Of the classifier's weights: nearly zero, so that the first steps do not tear the encoder (BEiT, arXiv 2106.08254)."""


class Classifier(nn.Module):
    """Images to logits, through the features before the projection, which takes no part and no gradient."""

    def __init__(self, encoder: VisionTransformer, num_classes: int, seed: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.width, num_classes)
        with torch.no_grad():
            self.head.weight.normal_(std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()
        encoder.projection.requires_grad_(False)

    @property
    def depth(self) -> int:
        """See `VisionTransformer.depth`."""
        return self.encoder.depth

    @property
    def dropping(self) -> Dropping | None:
        """See `VisionTransformer.dropping`."""
        return self.encoder.dropping

    def set_checkpointing(self, runner: BlockRunner | None, blocks: int | None = None) -> None:
        """See `VisionTransformer.set_checkpointing`."""
        self.encoder.set_checkpointing(runner, blocks)

    def first_weights(self) -> list[nn.Parameter]:
        """See `VisionTransformer.first_weights`."""
        return self.encoder.first_weights()

    def forward(self, images_B3HH: torch.Tensor, visit: Visit | None = None) -> torch.Tensor:
        """[B, C]. visit: see `VisionTransformer.forward_features`."""
        return self.head(self.encoder.forward_features(images_B3HH, visit))


def layer_groups(model: Classifier, weight_decay: float, learning_rate: float, layer_decay: float) -> list[dict]:
    """Parameter groups, the classifier's first: of each layer the matrices, which decay, and the rest, which do not.

    Learning rates are learning_rate * layer_decay^(L + 1 - layer) for L blocks: patches, positions, class token, their
    norm and angles are layer 0, block i (from 0) is layer i + 1, last norm and classifier L + 1 (Clark et al. 2020,
    arXiv 2003.10555; BEiT's numbers).
    """
    blocks = model.encoder.blocks
    above, own = len(blocks) + 1, {}
    for i, block in enumerate(blocks):
        own |= {id(parameter): i + 1 for parameter in block.parameters()}
    own |= {id(parameter): above for part in (model.encoder.norm_post, model.head) for parameter in part.parameters()}
    groups = []
    for group in decay_groups(model, weight_decay):
        for layer in range(above, -1, -1):
            members = [parameter for parameter in group["params"] if own.get(id(parameter), 0) == layer]
            if members:
                rate = learning_rate * layer_decay ** (above - layer)
                groups.append({"params": members, "weight_decay": group["weight_decay"], "lr": rate})
    return groups
