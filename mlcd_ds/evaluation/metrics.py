"""Figures of merit, in float64.

Shapes: n images, C classes.
"""

import numpy as np


def average_precision(is_positive_n: np.ndarray, scores_n: np.ndarray) -> float:
    """Sum over distinct scores, from the highest down, of (recall gained there) x (precision down to there).

    scikit-learn's definition (no interpolation; equal scores count as one step). is_positive_n: bool. NaN without a
    positive, where recall has no meaning.
    """
    precision, recall = _precision_and_recall(is_positive_n, scores_n)
    if len(recall) == 0 or recall[-1] == 0:
        return float("nan")
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def average_precisions(is_positive_nC: np.ndarray, scores_nC: np.ndarray) -> np.ndarray:
    """`average_precision` of each class, float64 [C]; NaN for a class without a positive."""
    columns = zip(is_positive_nC.T, scores_nC.T, strict=True)
    return np.array([average_precision(is_positive, scores) for is_positive, scores in columns], dtype=np.float64)


def eleven_point_precision(is_positive_n: np.ndarray, scores_n: np.ndarray) -> float:
    """Mean, over recalls r of 0, 0.1 ... 1, of the best precision at a recall of r or more: PASCAL VOC 2007's.

    (Everingham et al. 2010, Int. J. Computer Vision 88, section 4.2.) Equal scores count as one step. is_positive_n: bool.
    NaN without a positive.
    """
    precision, recall = _precision_and_recall(is_positive_n, scores_n)
    if len(recall) == 0 or recall[-1] == 0:
        return float("nan")
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    # 0.1 x 3 is a little more than 0.3: three of ten found must count as that recall.
    places = np.searchsorted(recall, np.arange(11) / 10 - 1e-12)
    return float(best_from_here[places].mean())


def _precision_and_recall(is_positive_n: np.ndarray, scores_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Down to each distinct score, from the highest on; recall is 0 where there is no positive."""
    scores_n = np.asarray(scores_n, dtype=np.float64)
    order = np.argsort(-scores_n, kind="stable")
    ranked, found = scores_n[order], np.cumsum(is_positive_n[order], dtype=np.float64)
    if len(found) == 0:
        return np.zeros(0), np.zeros(0)
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last place of each run of equal scores
    return found[ends] / (ends + 1.0), found[ends] / max(found[-1], 1.0)


def roc_auc(is_positive_n: np.ndarray, scores_n: np.ndarray) -> float:
    """Share of pairs of a positive and a negative that the scores put in order, equal scores counting a half.

    NaN without a positive or without a negative.
    """
    _, place_n, count = np.unique(np.asarray(scores_n, np.float64), return_inverse=True, return_counts=True)
    rank_n = (np.cumsum(count) - (count - 1) / 2)[place_n]  # mean rank of equals, from 1
    positives = int(np.count_nonzero(is_positive_n))
    negatives = len(rank_n) - positives
    if not positives or not negatives:
        return float("nan")
    return float((rank_n[is_positive_n].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def top_k_accuracy(truth_n: np.ndarray, scores_nC: np.ndarray, k: int) -> float:
    """Share of images whose class, an index [n], is among the k highest scores; of equal scores the first classes come
    first.

    A class of -1 (one that has no column) is never found.
    """
    truth_n, n = np.asarray(truth_n), len(truth_n)
    known = truth_n >= 0
    own_n1 = scores_nC[np.arange(n), np.maximum(truth_n, 0)][:, None]
    before = np.arange(scores_nC.shape[1]) < truth_n[:, None]
    rank_n = (scores_nC > own_n1).sum(1) + ((scores_nC == own_n1) & before).sum(1)
    return float(np.mean((rank_n < k) & known))


def mean_per_class_recall(truth_n: np.ndarray, predicted_n: np.ndarray) -> float:
    """Mean over the classes that occur in `truth_n` of the share of their images that are predicted to be of them."""
    _, class_n, count = np.unique(truth_n, return_inverse=True, return_counts=True)
    return float((np.bincount(class_n, weights=truth_n == predicted_n, minlength=len(count)) / count).mean())
