"""Pixels to the encoder's size. Everything stays uint8; normalising happens on the device, inside the encoder.

Bicubic resizing that filters when it shrinks: Pillow's in `resize_shorter_and_center_crop`, which is exact, and torch's of
the same filter elsewhere, several times faster (AVX2) and within one grey level of it. uint8 [H, W, 3] in, uint8 [size,
size, 3] out.
"""

import math

import numpy as np
import torch
from PIL import Image

from mlcd_ds.data.decode import Box, decode_crop

ASPECT_RANGE = (3 / 4, 4 / 3)
"""Aspect ratios (width / height) of random crops, the usual choice since Szegedy et al. 2015 (arXiv 1409.4842)."""

_ATTEMPTS = 10


def resize_shorter_and_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """CLIP's evaluation transform, exactly: shorter side to `size`, bicubic, then the central square."""
    image, target = _without_far_ends(image, size)
    if target != image.shape[1::-1]:
        image = np.array(_pillow(image).resize(target, Image.Resampling.BICUBIC))
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def decode_center_crop(data: bytes, max_pixels: int, size: int) -> np.ndarray:
    """`resize_shorter_and_center_crop` of an encoded image, fast: decoded no larger than needed, resized by torch.

    uint8 [size, size, 3], perhaps a view. Raises as `decode_image` does.
    """
    image = decode_crop(data, max_pixels, size, lambda width, height: (0, 0, width, height))
    image, (width, height) = _without_far_ends(image, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _resize(image, width, height)[top : top + size, left : left + size]


def decode_random_resized_crop(
    data: bytes, max_pixels: int, size: int, scale_min: float, flip: bool, generator: np.random.Generator
) -> np.ndarray:
    """`random_resized_crop` of an encoded image, decoded no larger than the crop drawn needs.

    The crop is drawn from the size in the header, so it does not depend on the scale of decoding, which rounds it by less
    than half an output pixel. Returns as `decode_center_crop` does; raises as `decode_image` does.
    """
    crop = decode_crop(data, max_pixels, size, lambda width, height: _crop_box(width, height, scale_min, generator))
    return _resize_and_flip(crop, size, flip, generator)


def random_resized_crop(
    image: np.ndarray, size: int, scale_min: float, flip: bool, generator: np.random.Generator
) -> np.ndarray:
    """A crop of `scale_min`..1 of the area, of aspect 3:4 to 4:3, resized to `size`; mirrored half of the time if `flip`.

    Every random choice comes from `generator`. Where no crop fits, the central one nearest to the allowed aspects.
    """
    left, top, width, height = _crop_box(image.shape[1], image.shape[0], scale_min, generator)
    return _resize_and_flip(image[top : top + height, left : left + width], size, flip, generator)


def _resize_and_flip(crop: np.ndarray, size: int, flip: bool, generator: np.random.Generator) -> np.ndarray:
    mirrored = flip and generator.random() < 0.5
    crop = _resize(crop, size, size)
    return crop[:, ::-1] if mirrored else crop


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic, with antialiasing."""
    if image.shape[:2] == (height, width):
        return image
    image_1HWC = torch.from_numpy(np.ascontiguousarray(image))[None]
    # Channels last, and said so by the strides: torch copies any other layout first, a third of the time.
    image_1CHW = image_1HWC.permute(0, 3, 1, 2)
    resized_1CHW = torch.nn.functional.interpolate(image_1CHW, size=(height, width), mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _crop_box(width: int, height: int, scale_min: float, generator: np.random.Generator) -> Box:
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


def _without_far_ends(image: np.ndarray, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The image, or the middle of a very long one, and the (width, height) that makes its shorter side `size`.

    Of a very long image only the middle is seen: without this cut a 1 x 20,000 image would grow to a billion pixels.
    """
    short = min(image.shape[:2])
    image = image[_middle(image.shape[0], 4 * short), _middle(image.shape[1], 4 * short)]
    height, width = image.shape[:2]
    return image, (max(size, int(size * width / short)), max(size, int(size * height / short)))


def _middle(length: int, limit: int) -> slice:
    """The central `limit` of `length`, centred exactly (one more where the parities differ)."""
    if length <= limit:
        return slice(0, length)
    start = (length - limit) // 2
    return slice(start, length - start)


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image))
