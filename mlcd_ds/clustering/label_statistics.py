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
CANDIDATES = 1 << 20
"""Labels that are looked through for the nearest images at a time."""
NOBODY = -1
"""Place of no image."""


class NearestImages:
    """The t images with the highest cosine to each cluster, among those that have it as one of their labels.

    cosines_kt: float16, falling, -inf where there are fewer; places_kt: int64 row numbers over all label shards, NOBODY
    there. Of equal cosines the earlier image is kept, so blocks of any size give the same images.
    """

    def __init__(self, num_classes: int, kept: int):
        self.cosines_kt = np.full((num_classes, kept), -np.inf, np.float16)
        self.places_kt = np.full((num_classes, kept), NOBODY, np.int64)

    def add(self, start: int, labels_nl: np.ndarray, cosines_nl: np.ndarray) -> None:
        """Images start..start+n, all later than those added before; int32 and float16 [n, l]."""
        images = max(1, CANDIDATES // labels_nl.shape[1])
        for first in range(0, len(labels_nl), images):
            part = slice(first, first + images)
            self._add(start + first, labels_nl[part], cosines_nl[part])

    def _add(self, start: int, labels_nl: np.ndarray, cosines_nl: np.ndarray) -> None:
        kept, label, cosine = self.places_kt.shape[1], labels_nl.ravel(), cosines_nl.ravel() + np.float16(0)
        # An earlier image stands before a later one of the same cosine, so the worst one kept must be beaten.
        better = np.flatnonzero((label != NO_LABEL) & (cosine > self.cosines_kt[label, -1]))
        if not len(better):
            return
        touched, slot = np.unique(label[better], return_inverse=True)
        slot = np.concatenate([np.repeat(np.arange(len(touched)), kept), slot])
        cosine = np.concatenate([self.cosines_kt[touched].ravel(), cosine[better]])
        place = np.concatenate([self.places_kt[touched].ravel(), start + better // labels_nl.shape[1]])
        # One number orders by cluster, falling cosine, place (the order here): 20 + 16 + 27 bits at most.
        bits = max(1, int(len(slot) - 1).bit_length())
        order = (slot.astype(np.int64) << 16 | _falling(cosine)) << bits | np.arange(len(slot))
        order.sort()
        order &= (1 << bits) - 1
        slot = slot[order]
        starts = np.searchsorted(slot, np.arange(len(touched)))
        within = np.arange(len(slot)) - starts[slot]
        best = within < kept
        self.cosines_kt[touched[slot[best]], within[best]] = cosine[order[best]]
        self.places_kt[touched[slot[best]], within[best]] = place[order[best]]

    def of(self, cluster: int, count: int, without: int = NOBODY) -> list[tuple[int, float]]:
        """(place, cosine) of at most `count` images, nearest first, the image at the place `without` left out."""
        pairs = zip(self.places_kt[cluster].tolist(), self.cosines_kt[cluster].tolist(), strict=True)
        return [(place, cosine) for place, cosine in pairs if place not in (NOBODY, without)][:count]


def _falling(cosine: np.ndarray) -> np.ndarray:
    """int64, in the opposite order of float16 numbers (none of them -0): their bits, read as sign and magnitude."""
    bits = cosine.view(np.uint16).astype(np.int64)
    return np.where(bits & 0x8000, bits, 0x7FFF - bits)


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
