"""Pixels to the encoder's size. Everything stays uint8; normalising happens on the device, inside the encoder.

Bicubic resizing by Pillow, which filters when it shrinks. uint8 [H, W, 3] in, uint8 [size, size, 3] out.
"""

import math

import numpy as np
from PIL import Image

ASPECT_RANGE = (3 / 4, 4 / 3)
"""Aspect ratios (width / height) of random crops, the usual choice since Szegedy et al. 2015 (arXiv 1409.4842)."""

_ATTEMPTS = 10
_REDUCING_GAP = (
    2.0  # Pillow first shrinks by whole factors while at least this much is left to do: fast, hardly visible
)


def resize_shorter_and_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """CLIP's evaluation transform: shorter side to `size`, bicubic, then the central square."""
    height, width = image.shape[:2]
    short = min(height, width)
    # Of a very long image only the middle is seen: without this cut a 1 x 20,000 image would grow to a billion pixels.
    image = image[_middle(height, 4 * short), _middle(width, 4 * short)]
    height, width = image.shape[:2]
    target = (max(size, int(size * width / short)), max(size, int(size * height / short)))
    if target != (width, height):
        image = np.array(_pillow(image).resize(target, Image.Resampling.BICUBIC))
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def random_resized_crop(
    image: np.ndarray, size: int, scale_min: float, flip: bool, generator: np.random.Generator
) -> np.ndarray:
    """A crop of `scale_min`..1 of the area, of aspect 3:4 to 4:3, resized to `size`; mirrored half of the time if `flip`.

    Every random choice comes from `generator`. Where no crop fits, the central one nearest to the allowed aspects.
    """
    left, top, width, height = _crop_box(image.shape[1], image.shape[0], scale_min, generator)
    mirrored = flip and generator.random() < 0.5
    crop = image[top : top + height, left : left + width]
    if (width, height) != (size, size):
        resized = _pillow(crop).resize((size, size), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
        crop = np.array(resized)
    return np.ascontiguousarray(crop[:, ::-1] if mirrored else crop)


def _crop_box(width: int, height: int, scale_min: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels."""
    low, high = (math.log(ratio) for ratio in ASPECT_RANGE)
    for _ in range(_ATTEMPTS):
        area = width * height * generator.uniform(scale_min, 1.0)
        aspect = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, w, h
    w = min(width, max(1, round(height * ASPECT_RANGE[1])))
    h = min(height, max(1, round(width / ASPECT_RANGE[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _middle(length: int, limit: int) -> slice:
    """The central `limit` of `length`, centred exactly (one more where the parities differ)."""
    if length <= limit:
        return slice(0, length)
    start = (length - limit) // 2
    return slice(start, length - start)


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image))
