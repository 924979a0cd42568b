"""Small tars and label shards for tests: random pictures, random labels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mlcd_ds.data.labels import LabelsInfo, write_label_shard
from mlcd_ds.data.tars import write_tar


def picture(seed: int, size: int = 32) -> bytes:
    """A JPEG of smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_shards(folder: Path, num_shards: int = 3, images: int = 40, size: int = 32) -> list[str]:
    """img2dataset-like tars; shard s has `images` + s pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(num_shards):
        samples = [
            (f"{shard:05d}{row:04d}", {"jpg": picture(shard * 1000 + row, size)}) for row in range(images + shard)
        ]
        paths.append(str(folder / f"{shard:05d}.tar"))
        write_tar(paths[-1], samples)
    return paths


def make_labels(
    folder: Path, num_shards: int = 3, images: int = 40, k: int = 50, l: int = 8, centers_hash: str = "c0ffee"
) -> None:
    """Label shards for `make_shards`, distinct random labels."""
    info = LabelsInfo(k, l, centers_hash, "random")
    for shard in range(num_shards):
        generator = np.random.default_rng(shard)
        keys = [f"{shard:05d}{row:04d}" for row in range(images + shard)]
        labels = np.stack([generator.permutation(k)[:l] for _ in keys])
        cosines = np.sort(generator.random(labels.shape))[:, ::-1]
        write_label_shard(folder / f"{shard:05d}.parquet", keys, labels, cosines, info)
