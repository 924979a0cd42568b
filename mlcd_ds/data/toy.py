"""Toy image shards without a download: scikit-learn's handwritten digits, composed into scenes with clutter.

A scene is a function of (seed, split, index); test scenes are composed from handwritten digits no train scene uses.

Shapes: S canvas side in pixels, s side of one digit on it.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from mlcd_ds.config import ToyShardsConfig
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import DataError
from mlcd_ds.files import make_folder, write_json, write_text

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "test")
TEST_SHARE = 0.2
"""Share of the handwritten digits kept for test scenes."""
MARKER = "toy.json"
"""Written unfinished first and finished last: it says whose folder this is, and whether it is whole."""

DIGITS_PER_SCENE = (0.1, 0.2, 0.3, 0.4)
"""Probabilities of 1, 2, 3 and 4 digits."""
CLASSES_PER_SCENE = (0.5, 0.35, 0.15)
"""Probabilities of 1, 2 and 3 classes among them, where there are enough: in photographs, too, things repeat."""
SIDES = (0.44, 0.47)
"""Smallest and largest side of a digit, as a share of the canvas."""
MAX_OVERLAP = 0.12
"""Largest share of a digit's square that another digit may cover."""
PLACES_TRIED = 60
TINT = 8
"""Largest difference of a colour channel from grey, of 255: the clusters would follow stronger tints."""
ROTATION = 4
"""Largest turn of a digit, degrees."""
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: pixels uint8 [n, 8, 8] (ink is bright), classes int64 [n]."""

    pixels: np.ndarray
    classes: np.ndarray

    def choose(self, digit: int, generator: np.random.Generator) -> np.ndarray:
        """One of the pictures of `digit`, uint8 [8, 8]."""
        return self.pixels[generator.choice(np.flatnonzero(self.classes == digit))]


def load_digits(split: str) -> Digits:
    """The digits of one split, uint8; a fixed fifth of every class is the test's."""
    from sklearn.datasets import load_digits as load  # a second of import time that only this function needs

    bunch = load()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    is_test = np.zeros(len(pixels), dtype=bool)
    for digit in range(len(WORDS)):
        mine = np.random.default_rng(digit).permutation(np.flatnonzero(bunch.target == digit))
        is_test[mine[: round(len(mine) * TEST_SHARE)]] = True
    chosen = is_test if split == "test" else ~is_test
    return Digits(pixels[chosen], bunch.target[chosen].astype(np.int64))


def compose_scene(digits: Digits, size: int, generator: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """(uint8 [S, S, 3], the 1-4 digits in it, of 1-3 classes, leftmost first)."""
    count = 1 + int(generator.choice(len(DIGITS_PER_SCENE), p=DIGITS_PER_SCENE))
    num_classes = min(count, 1 + int(generator.choice(len(CLASSES_PER_SCENE), p=CLASSES_PER_SCENE)))
    classes = generator.choice(len(WORDS), size=num_classes, replace=False)
    wanted = np.concatenate([classes, generator.choice(classes, size=count - num_classes)])
    canvas = _background(size, generator)
    squares = _places(count, size, generator)
    for digit, (left, top, side) in zip(wanted, squares, strict=True):
        _draw(canvas, digits.choose(int(digit), generator), left, top, side, generator)
    noise = generator.normal(0.0, generator.uniform(1.5, 3.0), canvas.shape)
    image = np.clip(np.rint(canvas + noise), 0, 255).astype(np.uint8)
    by_place = sorted(range(count), key=lambda i: squares[i][0])
    return image, [int(wanted[i]) for i in by_place]


def _background(size: int, generator: np.random.Generator) -> np.ndarray:
    """A dark, hardly tinted slope of brightness with faint strokes and specks on it, float64 [S, S, 3]."""
    base = generator.uniform(20, 50) + generator.uniform(-TINT, TINT, 3)
    direction = generator.normal(size=2)
    direction /= np.linalg.norm(direction)
    rows, columns = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    slope = generator.uniform(0, 25) * (rows * direction[0] + columns * direction[1])
    picture = Image.fromarray(np.clip(base + slope[..., None], 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)

    def shade() -> tuple[int, ...]:
        return tuple(int(v) for v in np.clip(base + generator.uniform(-20, 20), 0, 255))

    for _ in range(generator.integers(0, 3)):
        ends = [tuple(point) for point in generator.uniform(-0.1 * size, 1.1 * size, (2, 2))]
        draw.line(ends, fill=shade(), width=max(1, size // 32))
    for _ in range(generator.integers(0, 3)):
        x, y = generator.uniform(0, size, 2)
        radius = generator.uniform(0.02, 0.05) * size
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade())
    return np.asarray(picture, dtype=np.float64)


def _places(count: int, size: int, generator: np.random.Generator) -> list[tuple[int, int, int]]:
    """`count` squares (left, top, side) inside the canvas that hardly overlap."""
    squares: list[tuple[int, int, int]] = []
    while len(squares) < count:
        for _ in range(PLACES_TRIED):
            side = round(size * generator.uniform(*SIDES))
            left, top = (int(v) for v in generator.integers(0, size - side + 1, 2))
            if all(_overlap((left, top, side), other) <= MAX_OVERLAP for other in squares):
                squares.append((left, top, side))
                break
        else:
            squares.clear()  # the first ones left no room: lay all of them anew
    return squares


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Shared area as a share of the smaller square."""
    width, height = (min(a[axis] + a[2], b[axis] + b[2]) - max(a[axis], b[axis]) for axis in (0, 1))
    return max(0, width) * max(0, height) / min(a[2], b[2]) ** 2


def _draw(
    canvas: np.ndarray, digit: np.ndarray, left: int, top: int, side: int, generator: np.random.Generator
) -> None:
    """Lays one digit of a bright colour over the canvas, in place; its ink is the opacity."""
    ink = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(float(generator.uniform(-ROTATION, ROTATION)), resample=Image.Resampling.BICUBIC)
    opacity = np.asarray(ink, dtype=np.float64)[..., None] / 255 * generator.uniform(0.9, 1.0)
    colour = np.clip(generator.uniform(190, 240) + generator.uniform(-TINT, TINT, 3), 0, 255)
    square = canvas[top : top + side, left : left + side]
    square += opacity * (colour - square)


def caption(drawn: list[int]) -> str:
    """'a picture of two threes, an eight and a one' for [3, 8, 3, 1]."""
    names = []
    for digit, count in Counter(drawn).items():
        plural = WORDS[digit] + ("es" if digit == 6 else "s")
        names.append(f"{'an' if digit == 8 else 'a'} {WORDS[digit]}" if count == 1 else f"{WORDS[count]} {plural}")
    return "a picture of " + " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def scene_samples(
    digits: Digits, split: str, shard: int, count: int, config: ToyShardsConfig
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one shard in img2dataset's layout: KEY.jpg, KEY.txt (caption), KEY.json (with the true classes)."""
    for index in range(count):
        position = shard * config.images_per_shard + index
        generator = np.random.default_rng([config.seed, SPLITS.index(split), position])
        image, drawn = compose_scene(digits, config.image_size, generator)
        key, text = f"{shard:05d}{index:04d}", caption(drawn)
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        record = {"key": key, "caption": text, "classes": sorted(set(drawn))}
        yield key, {"jpg": encoded.getvalue(), "txt": text.encode(), "json": json.dumps(record).encode()}


def write_toy_shards(config: ToyShardsConfig) -> bool:
    """Writes output_dir/train/00000.tar... and output_dir/test/..., with the names of the classes; False if all was there.

    Shards finished by an interrupted call with the same settings are kept. Raises DataError where the folder holds
    shards of other settings, or not made by this function.
    """
    root = Path(config.output_dir)
    settings = config.model_dump(exclude={"output_dir"})
    if _read_marker(root, settings):
        return False
    make_folder(root)
    _write_marker(root, settings, finished=False)
    for split, total in zip(SPLITS, (config.num_train, config.num_test), strict=True):
        digits = load_digits(split)
        starts = range(0, total, config.images_per_shard)
        for shard, start in enumerate(tqdm(starts, desc=f"{split} scenes", unit="shard", disable=None)):
            tar = root / split / f"{shard:05d}.tar"
            if tar.exists() and tar.with_name(f"{shard:05d}_stats.json").exists():
                continue
            write_tar(tar, scene_samples(digits, split, shard, min(config.images_per_shard, total - start), config))
    _write_names(root)
    _write_marker(root, settings, finished=True)
    return True


def _write_names(root: Path) -> None:
    """What tools/zero_shot.py reads of a set in CLIP_benchmark's layout."""
    write_text(root / "classnames.txt", "".join(f"{word}\n" for word in WORDS))
    templates = ("a picture of a {c}", "a picture of two {c}s")
    write_text(root / "zeroshot_classification_templates.txt", "".join(f"{text}\n" for text in templates))
    write_text(root / "dataset_type.txt", "multilabel\n")


def _read_marker(root: Path, settings: dict) -> bool:
    """True if the folder is whole and of these settings; False if it is still to be written."""
    marker = root / MARKER
    if not marker.exists():
        foreign = next((path for split in SPLITS for path in sorted((root / split).glob("*.tar"))), None)
        if foreign is not None:
            raise DataError(f"{foreign} was not made by this tool ({marker} is not there): choose another --output_dir")
        return False
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        there, finished = found["settings"], bool(found["finished"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{marker} is damaged ({error!r}): delete {root} and start again") from None
    if there != settings:
        changed = [
            f"{name} {there.get(name)!r}, not {value!r}" for name, value in settings.items() if there.get(name) != value
        ]
        raise DataError(
            f"{root} holds toy shards made with {'; '.join(changed)}: choose another --output_dir or delete it"
        )
    return finished


def _write_marker(root: Path, settings: dict, finished: bool) -> None:
    write_json(root / MARKER, {"settings": settings, "finished": finished})
