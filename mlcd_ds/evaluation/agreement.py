"""How well clusters agree with true classes: purity and normalised mutual information.

From the cells of the contingency table that are not zero, so a million clusters and thousands of classes fit.

Shapes: n images, p pairs of an image and one of its classes, k clusters, z cells that are not zero.
"""

from dataclasses import dataclass

import numpy as np

from mlcd_ds.batch import NO_LABEL


@dataclass(frozen=True)
class ImageClasses:
    """The true classes of n images: image i has values[offsets[i]:offsets[i + 1]], none twice.

    offsets: int64 [n + 1]. values: int64 [p].
    """

    offsets: np.ndarray
    values: np.ndarray

    @staticmethod
    def of(classes: list[tuple[int, ...]]) -> "ImageClasses":
        """From a tuple per image."""
        counts = np.fromiter((len(found) for found in classes), np.int64, len(classes))
        values = np.fromiter((number for found in classes for number in found), np.int64, int(counts.sum()))
        return ImageClasses(np.concatenate([[0], counts.cumsum()]), values)

    @staticmethod
    def joined(parts: list["ImageClasses"]) -> "ImageClasses":
        """All images of `parts`, one after the other."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return ImageClasses(np.concatenate([[0], counts.cumsum()]), np.concatenate([part.values for part in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Agreement:
    """purity, nmi: see `agreement`. images: counted ones; left_out: without a cluster or a class. num_classes: found.

    clusters: int64, the clusters that have images, rising; majority: int64, the commonest class of each of these (the
    lowest of equals); majority_share: float64, the share of its counted images that have it.
    """

    purity: float
    nmi: float
    images: int
    left_out: int
    num_classes: int
    clusters: np.ndarray
    majority: np.ndarray
    majority_share: np.ndarray


def agreement(clusters_n: np.ndarray, classes: ImageClasses) -> Agreement:
    """Agreement of each image's cluster (int [n], NO_LABEL for none) with its true classes.

    purity: share of images that have the commonest class of their cluster. nmi: mutual information of cluster and class over
    the mean of their entropies. With one class per image both are the usual ones (Manning, Raghavan and Schuetze,
    "Introduction to Information Retrieval", 16.3; scikit-learn's normalized_mutual_info_score); an image of m classes
    counts as 1/m of an image in each of them for nmi. Memory: about 60 bytes a pair. Both are 0 without any image.

    Raises ValueError when the lengths differ: a fault of the caller.
    """
    clusters_n = np.asarray(clusters_n, np.int64)
    if len(clusters_n) != len(classes):
        raise ValueError(f"{len(clusters_n)} clusters for {len(classes)} images")
    counts_n = np.diff(classes.offsets)
    counted_n = (clusters_n != NO_LABEL) & (counts_n > 0)
    images, kept_p = int(counted_n.sum()), np.repeat(counted_n, counts_n)
    if not images:
        none = np.zeros(0, np.int64)
        return Agreement(0.0, 0.0, 0, len(clusters_n), 0, none, none, none.astype(np.float64))
    names, class_p = np.unique(classes.values[kept_p], return_inverse=True)
    counts_n, clusters_n = counts_n[counted_n], clusters_n[counted_n]
    cells_z, cell_p, images_z = np.unique(
        np.repeat(clusters_n, counts_n) * len(names) + class_p, return_inverse=True, return_counts=True
    )
    weight_z = np.bincount(cell_p, weights=np.repeat(1 / counts_n, counts_n))
    cluster_z, class_z = np.divmod(cells_z, len(names))
    clusters, first, row_z = np.unique(cluster_z, return_index=True, return_inverse=True)
    commonest = np.maximum.reduceat(images_z, first)
    best = np.flatnonzero(images_z == commonest[row_z])
    best = best[np.unique(row_z[best], return_index=True)[1]]  # the first of equals
    size = np.bincount(np.searchsorted(clusters, clusters_n))
    return Agreement(
        purity=float(commonest.sum() / images),
        nmi=_nmi(weight_z / images, row_z, class_z),
        images=images,
        left_out=len(counted_n) - images,
        num_classes=len(names),
        clusters=clusters,
        majority=names[class_z[best]],
        majority_share=commonest / size,
    )


def _nmi(share_z: np.ndarray, row_z: np.ndarray, column_z: np.ndarray) -> float:
    """Of a joint distribution given by its cells; 1 for one cluster and one class, as scikit-learn has it."""
    rows, columns = np.bincount(row_z, weights=share_z), np.bincount(column_z, weights=share_z)
    mean = (_entropy(rows) + _entropy(columns)) / 2
    if mean == 0:
        return 1.0
    information = float((share_z * (np.log(share_z) - np.log(rows[row_z]) - np.log(columns[column_z]))).sum())
    return max(0.0, information) / mean


def _entropy(share: np.ndarray) -> float:
    share = share[share > 0]
    return max(0.0, float(-(share * np.log(share)).sum()))
