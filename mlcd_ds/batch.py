"""What travels from the loader to the loss.

Shapes: B images of this rank, L labels an image, H height and width in pixels.
"""

from dataclasses import dataclass

import torch

NO_LABEL = -1
"""Fills up the label list of an image that has fewer than L positives."""

NO_IMAGE = -2
"""Fills the whole label row where the batch has no image: a skipped sample keeps its slot, so shapes stay constant."""


def head_suffix(index: int) -> str:
    """What tells the names of several heads apart: nothing for the first, "_1" for the second."""
    return f"_{index}" if index else ""


@dataclass(frozen=True)
class ImageLabelBatch:
    """One rank's images of one step.

    images_BCHH: uint8 [B, 3, H, H], RGB. Rows without an image are zero.
    labels_BL: int64 [B, L], nearest center first, NO_LABEL where an image has fewer, NO_IMAGE in rows without an image.
    With H heads [B, H*L]: head h owns the columns h*L to (h+1)*L. Of a run on captions: the tokens of each image's caption,
    NO_IMAGE in rows without an image.
    keys: the B sample keys, "" in rows without an image.
    """

    images_BCHH: torch.Tensor
    labels_BL: torch.Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels_BL)

    def labels_of_heads(self, heads: int) -> list[torch.Tensor]:
        """The labels [B, L] of each of `heads` heads. Raises ValueError where the columns cannot be shared out evenly."""
        columns, rest = divmod(self.labels_BL.shape[1], heads)
        if rest:
            raise ValueError(f"{self.labels_BL.shape[1]} label columns are not a multiple of {heads} heads")
        return [own.contiguous() for own in self.labels_BL.split(columns, dim=1)]

    def split(self, rows: int) -> list["ImageLabelBatch"]:
        """Consecutive micro-batches of `rows` rows each (the last may be shorter)."""
        return [
            ImageLabelBatch(self.images_BCHH[i : i + rows], self.labels_BL[i : i + rows], self.keys[i : i + rows])
            for i in range(0, len(self), rows)
        ]

    def pin_memory(self) -> "ImageLabelBatch":
        """Called by torch's DataLoader when it pins memory."""
        return ImageLabelBatch(self.images_BCHH.pin_memory(), self.labels_BL.pin_memory(), self.keys)
