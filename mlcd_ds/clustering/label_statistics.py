"""What the label shards say about the clusters, in one pass over them.

Memory: a few numbers a cluster, `kept` images a cluster, and one block of images; never all images.

Shapes: n images of a block, k clusters, l labels an image, t nearest images kept of each cluster.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.data.labels import LabelsInfo, check_same_labels, label_path, read_label_shard
from mlcd_ds.errors import DataError

BLOCK_IMAGES = 262_144
"""Images that are counted together: bincounts over a million clusters should not be made for each shard."""
COSINE_BINS = 400
"""Of histograms over -1..1: 0.005 wide, above the steps of float16 (0.0005 below 1)."""
CANDIDATES = 1 << 19
"""Labels that are looked through for the nearest images at a time."""
PLACE_BITS = 46
"""Of a place in a key; the cosine has the 16 above."""
NOBODY = np.iinfo(np.int64).max
"""Key of no image."""


class NearestImages:
    """The t images with the highest cosine to each cluster, among those that have it as one of their labels.

    keys_kt: int64, rising: an image's cosine and its place (row number over all label shards) in one number that orders by
    falling cosine and then by place, NOBODY where there are fewer images. So blocks of any size give the same images.
    """

    def __init__(self, num_classes: int, kept: int):
        self.keys_kt = np.full((num_classes, kept), NOBODY, np.int64)
        self._worst_k = np.full(num_classes, NOBODY, np.int64)

    def add(self, start: int, labels_nl: np.ndarray, cosines_nl: np.ndarray) -> None:
        """Images start..start+n; int32 and float16 [n, l]."""
        images = max(1, CANDIDATES // labels_nl.shape[1])
        for first in range(0, len(labels_nl), images):
            part = slice(first, first + images)
            self._add(start + first, labels_nl[part], cosines_nl[part])

    def _add(self, start: int, labels_nl: np.ndarray, cosines_nl: np.ndarray) -> None:
        kept, label, cosine = self.keys_kt.shape[1], labels_nl.ravel(), cosines_nl.ravel()
        key = _falling(cosine) << PLACE_BITS | (start + np.arange(len(label)) // labels_nl.shape[1])
        better = np.flatnonzero((label != NO_LABEL) & (key < self._worst_k[label]))
        if not len(better):
            return
        label, key = label[better], key[better]
        order = np.lexsort((key, label))
        label, key = label[order], key[order]
        touched, first, counts = np.unique(label, return_index=True, return_counts=True)
        slot = np.repeat(np.arange(len(touched)), counts)
        rank = np.arange(len(label)) - first[slot]
        there = rank < kept
        rows = np.full((len(touched), kept + min(kept, int(counts.max()))), NOBODY, np.int64)
        rows[:, :kept] = self.keys_kt[touched]
        rows[slot[there], kept + rank[there]] = key[there]
        rows.sort(axis=1)
        self.keys_kt[touched] = rows[:, :kept]
        self._worst_k[touched] = rows[:, kept - 1]

    def of(self, cluster: int, count: int, without: int | None = None) -> list[tuple[int, float]]:
        """(place, cosine) of at most `count` images, nearest first, the image at the place `without` left out."""
        keys = self.keys_kt[cluster][self.keys_kt[cluster] != NOBODY]
        pairs = zip((keys & ((1 << PLACE_BITS) - 1)).tolist(), _cosine(keys >> PLACE_BITS).tolist(), strict=True)
        return [(place, cosine) for place, cosine in pairs if place != without][:count]


def _falling(cosine: np.ndarray) -> np.ndarray:
    """int64 of 16 bits, in the opposite order of float16 numbers: their bits, read as sign and magnitude."""
    bits = (cosine + np.float16(0)).view(np.uint16).astype(np.int64)  # -0 becomes 0
    return np.where(bits & 0x8000, bits, 0x7FFF - bits)


def _cosine(falling: np.ndarray) -> np.ndarray:
    """Inverse of `_falling`."""
    return np.where(falling & 0x8000, falling, 0x7FFF - falling).astype(np.uint16).view(np.float16)


class LabelStatistics:
    """Counts over all images of the label shards.

    sizes_k: int64, images whose nearest label is the cluster. mentions_k: int64, images that have it among their labels.
    cosine_sum_k: float64, sum over the first of these of the cosine to it. nearest_histogram, last_histogram: int64
    [COSINE_BINS] over -1..1, of each image's first and last label. labels_histogram: int64 [l + 1], images by number of
    labels.
    """

    def __init__(self, info: LabelsInfo, kept: int):
        self.info, self.num_images = info, 0
        self.sizes_k = np.zeros(info.num_classes, np.int64)
        self.mentions_k = np.zeros(info.num_classes, np.int64)
        self.cosine_sum_k = np.zeros(info.num_classes)
        self.nearest_histogram = np.zeros(COSINE_BINS, np.int64)
        self.last_histogram = np.zeros(COSINE_BINS, np.int64)
        self.labels_histogram = np.zeros(info.num_positives + 1, np.int64)
        self.nearest = NearestImages(info.num_classes, kept)

    def add(self, labels_nl: np.ndarray, cosines_nl: np.ndarray) -> None:
        """A block of images: int32 and float16 [n, l], nearest first, NO_LABEL as padding at the end."""
        k, there_nl = self.info.num_classes, labels_nl != NO_LABEL
        counts_n = there_nl.sum(1)
        some = np.flatnonzero(counts_n)
        first, cosine = labels_nl[some, 0], cosines_nl[some, 0].astype(np.float64)
        self.sizes_k += np.bincount(first, minlength=k)
        self.mentions_k += np.bincount(labels_nl[there_nl], minlength=k)
        self.cosine_sum_k += np.bincount(first, weights=cosine, minlength=k)
        self.nearest_histogram += cosine_histogram(cosine)
        self.last_histogram += cosine_histogram(cosines_nl[some, counts_n[some] - 1])
        self.labels_histogram += np.bincount(counts_n, minlength=self.info.num_positives + 1)
        self.nearest.add(self.num_images, labels_nl, cosines_nl)
        self.num_images += len(labels_nl)

    @property
    def mean_cosine_k(self) -> np.ndarray:
        """float64 [k]: mean cosine of a cluster's images to its center; not a number where it has none."""
        with np.errstate(invalid="ignore"):
            return self.cosine_sum_k / self.sizes_k


def cosine_histogram(cosines: np.ndarray) -> np.ndarray:
    """int64 [COSINE_BINS] over -1..1; what rounding brought beyond counts in the outer bins."""
    bins = ((np.asarray(cosines, np.float32) + 1) * (COSINE_BINS / 2)).astype(np.int64)
    return np.bincount(np.clip(bins, 0, COSINE_BINS - 1).ravel(), minlength=COSINE_BINS)


def gather_statistics(
    folder: str | Path, names: Sequence[str], rows: Sequence[int], info: LabelsInfo, kept: int, bar
) -> LabelStatistics:
    """Reads the label shards `names` of `rows` images each and counts them. bar: is told of the images read (tqdm).

    Raises DataError for shards that are damaged, or changed since `rows` and `info` were read.
    """
    statistics = LabelStatistics(info, kept)
    for labels_nl, cosines_nl in _blocks(Path(folder), names, rows, info, bar):
        statistics.add(labels_nl, cosines_nl)
    return statistics


def _blocks(folder: Path, names: Sequence[str], rows: Sequence[int], info: LabelsInfo, bar) -> Iterator:
    """(labels, cosines) of many shards at a time."""
    parts, waiting = [], 0
    for name, expected in zip(names, rows, strict=True):
        path = label_path(folder, name)
        shard = read_label_shard(path)
        check_same_labels([(label_path(folder, names[0]), info), (path, shard.info)])
        if len(shard.keys) != expected:
            raise DataError(
                f"{path} had {expected} rows at the start, now {len(shard.keys)}: it changed meanwhile. Start again when "
                "tools/assign_labels.py has finished."
            )
        parts.append((shard.labels, shard.cosines))
        waiting += expected
        bar.update(expected)
        if waiting >= BLOCK_IMAGES:
            yield tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            parts, waiting = [], 0
    if parts:
        yield tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
