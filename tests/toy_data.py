"""Small tars and label shards for the tests of the data path."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mlcd_ds.data.labels import LabelsInfo, label_path, write_label_shard
from mlcd_ds.data.tars import write_tar

INFO = LabelsInfo(num_classes=50, num_positives=3, centers_hash="c0ffee", feature_model="builtin:toy")


def encode(image, kind: str = "JPEG", **options) -> bytes:
    """A Pillow image or an array as bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """Smooth blobs of colour, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def labels_of(key: str) -> np.ndarray:
    """The three labels of a key."""
    return (int(key) * np.array([1, 7, 11]) + np.array([0, 1, 2])) % INFO.num_classes


def write_labels(folder: Path, shard: str, keys, info: LabelsInfo = INFO) -> None:
    """The label shard of `keys`, in reversed order: it must be joined by key."""
    keys = list(keys)[::-1]
    labels = np.array([labels_of(key)[: info.num_positives] for key in keys]).reshape(-1, info.num_positives)
    write_label_shard(label_path(folder, shard), keys, labels, np.full(labels.shape, 0.5), info)


def make_shards(folder: Path, counts, contents=None) -> list[str]:
    """`tars/0000S.tar` of counts[S] pictures each, and `labels/`; contents: {key: bytes} to put in place of pictures."""
    contents = contents or {}
    paths = []
    for shard, count in enumerate(counts):
        keys = [f"{shard:05d}{i:04d}" for i in range(count)]
        images = {key: contents[key] if key in contents else encode(picture(int(key))) for key in keys}
        paths.append(str(folder / "tars" / f"{shard:05d}.tar"))
        write_tar(paths[-1], ((key, {"jpg": image, "txt": b"text"}) for key, image in images.items()))
        write_labels(folder / "labels", f"{shard:05d}", keys)
    return paths
