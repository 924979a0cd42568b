"""Image bytes to RGB pixels: uint8 [H, W, 3].

JPEGs go through libjpeg-turbo (simplejpeg), decoded at a half, a quarter or an eighth where the caller needs few pixels;
everything else, and the rare JPEG with CMYK or unusual sampling, through Pillow. The header is judged before any pixel is
decoded.
"""

import contextlib
import errno
import io
import struct
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from mlcd_ds.data.storage import UnreadableError, cure_of
from mlcd_ds.errors import DataError

SCALE_MARGIN = 1.5
"""A scaled-down JPEG keeps at least this times the pixels a side that the caller will resize it to: the DCT's scaling is
coarser than the bicubic resize that follows (mean against the full decode at 1.8: 40 to 44 dB, at 1.1: 36 dB)."""

FAST_MARGIN = 1.4
"""From so many pixels a side for each one wanted on, the fast DCT and colour upsampling: 44 dB to the exact ones on
photographs at 1.7. Unshrunk, the coarser colours would show (34 dB)."""

_SCALES = (8, 4, 2)
"""Divisors of the scaled decode. libjpeg-turbo knows all of N/8, but the others lack SIMD code: slower than full size."""

Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
_TURNED, _X_MIRRORED, _Y_MIRRORED = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


IMAGE_PROBLEMS = ("empty", "not_an_image", "too_large", "broken")
"""Why an image cannot be used."""


class ImageError(DataError):
    """An image that cannot be used. reason: one of IMAGE_PROBLEMS, or a caller's own."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return ImageError, (self.reason, str(self))


def decode_image(data: bytes, max_pixels: int, min_side: int | None = None) -> np.ndarray:
    """RGB pixels of a JPEG, PNG or WebP: uint8 [H, W, 3], C-contiguous.

    Grayscale, palette, CMYK and 16-bit images become 8-bit RGB; transparency is laid on white; an EXIF orientation is
    applied; of an animation the first frame counts. max_pixels: a larger image, judged by its header, is refused.
    min_side: a JPEG may come back smaller, with a shorter side of at least SCALE_MARGIN * min_side. None: full size.
    Raises ImageError; a JPEG that is cut or damaged is refused, not filled with grey. UnreadableError where the memory does
    not suffice, which is no image's fault.
    """
    if not data:
        raise ImageError("empty", "0 bytes")
    with _telling_of_memory():
        if data[:3] == b"\xff\xd8\xff":
            header = _jpeg_header(data, max_pixels)
            if header is not None:
                height, width, orientation = header
                return _orient(_decode_jpeg(data, header, _divisor(min(height, width), min_side)), orientation)
        return _decode_other(data, max_pixels)


def decode_crop(data: bytes, max_pixels: int, size: int, choose: Callable[[int, int], Box]) -> np.ndarray:
    """The part of an image that `choose(width, height)`, asked once, picks of the upright image: uint8 [h, w, 3].

    size: pixels a side that the caller will resize the crop to. A JPEG comes back at a half, a quarter or an eighth where
    that leaves at least SCALE_MARGIN * size pixels a side; the box is then rounded to that scale's pixels. From FAST_MARGIN
    on its DCT and its upsampling of colours are the fast ones. May be a view.
    Raises as `decode_image` does, and converts as it does.
    """
    if not data:
        raise ImageError("empty", "0 bytes")
    with _telling_of_memory():
        return _decode_crop(data, max_pixels, size, choose)


@contextlib.contextmanager
def _telling_of_memory() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise UnreadableError(f"no memory to decode an image. {cure_of(errno.ENOMEM)}") from None


def _raise_lack_of_memory(error: Exception) -> None:
    """Raises MemoryError for what Pillow's decoders, libjpeg and turbojpeg say where they get none."""
    words = ("out of memory", "Insufficient memory", "Memory allocation failure")
    if any(text in str(error) for text in words):
        raise MemoryError from None


def _decode_crop(data: bytes, max_pixels: int, size: int, choose: Callable[[int, int], Box]) -> np.ndarray:
    header = _jpeg_header(data, max_pixels) if data[:3] == b"\xff\xd8\xff" else None
    if header is None:
        image = _decode_other(data, max_pixels)
        left, top, width, height = choose(image.shape[1], image.shape[0])
        return image[top : top + height, left : left + width]
    height, width, orientation = header
    upright = (height, width) if orientation in _TURNED else (width, height)
    left, top, width, height = choose(*upright)
    side = min(width, height)
    divisor = _divisor(side, size)
    image = _orient(_decode_jpeg(data, header, divisor, fast=side >= FAST_MARGIN * size), orientation)
    # A scaled image ends in a partial pixel, which mirroring brings to the front.
    beyond_x, beyond_y = (-side % divisor for side in upright)
    left += beyond_x if orientation in _X_MIRRORED else 0
    top += beyond_y if orientation in _Y_MIRRORED else 0
    left, top, width, height = (round(side / divisor) for side in (left, top, width, height))
    return image[top : top + height, left : left + width]


def _divisor(side: int, wanted: int | None) -> int:
    """By how much `side` pixels may shrink when they will be resized to `wanted`; None: not at all."""
    if wanted is None:
        return 1
    return next((divisor for divisor in _SCALES if side // divisor >= SCALE_MARGIN * wanted), 1)


def _decode_other(data: bytes, max_pixels: int) -> np.ndarray:
    """Through Pillow."""
    if data[:8] == _PNG_START and len(data) >= 24:
        # Before Pillow, which only warns of images up to 179 million pixels.
        _check_size(*struct.unpack_from(">II", data, 16), max_pixels)
    return _decode_with_pillow(data, max_pixels)


def _jpeg_header(data: bytes, max_pixels: int) -> tuple[int, int, int] | None:
    """(height, width, EXIF orientation) as stored; None: Pillow should have a look."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # cut in the header, or a sampling that turbojpeg has no name for
        return None
    _check_size(width, height, max_pixels)
    return (height, width, _jpeg_orientation(data)) if colors in ("YCbCr", "RGB", "Gray") else None


def _decode_jpeg(data: bytes, header: tuple[int, int, int], divisor: int, fast: bool = False) -> np.ndarray:
    """At 1 / divisor of the size, rounded up, as stored. fast: with the less exact DCT and colour upsampling."""
    height, width = (-(-side // divisor) if divisor > 1 else 0 for side in header[:2])  # 0: no scaling
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fast, fast, height, width)
    except ValueError as error:
        _raise_lack_of_memory(error)
        if "extraneous bytes" not in str(error):
            raise ImageError("broken", f"damaged or cut JPEG: {error}") from None
        # Stray bytes between segments lose no pixel; every other warning does.
        return simplejpeg.decode_jpeg(data, "RGB", fast, fast, height, width, strict=False)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height} pixels, --max_pixels allows {max_pixels}")


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation 1..8; 1 where there is none or it makes no sense."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # pixels begin
            break
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xE1 and data[position + 4 : position + 10] == _EXIF:
            return _orientation_in_tiff(data[position + 10 : position + 2 + length])
        position += 2 + length
    return 1


def _orientation_in_tiff(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG and kind == 3 and count == 1:
                (value,) = struct.unpack_from(order + "H", tiff, directory + 10 + 12 * entry)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns [H, W, 3] as EXIF's `orientation` says."""
    if orientation == 1:
        return image
    if orientation in _TURNED:
        image = image.transpose(1, 0, 2)
    if orientation in _Y_MIRRORED:
        image = image[::-1]
    if orientation in _X_MIRRORED:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError("not_an_image", f"begins with {data[:16]!r}: no JPEG, PNG or WebP") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise ImageError("broken", f"{type(error).__name__}: {error}") from None
    with image:
        _check_size(*image.size, max_pixels)
        try:
            image.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
        except MemoryError:
            raise
        except Exception as error:
            _raise_lack_of_memory(error)
            raise ImageError("broken", f"damaged or cut {image.format}: {type(error).__name__}: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's convert would clip at 255
        values = np.asarray(image)
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")
