"""Figures of merit, in float64.

Shapes: n images, C classes.
"""

import numpy as np


def average_precision(is_positive_n: np.ndarray, scores_n: np.ndarray) -> float:
    """Sum over distinct scores, from the highest down, of (recall gained there) x (precision down to there).

    scikit-learn's definition (no interpolation; equal scores count as one step). is_positive_n: bool. NaN without a
    positive, where recall has no meaning.
    """
    scores_n = np.asarray(scores_n, dtype=np.float64)
    order = np.argsort(-scores_n, kind="stable")
    ranked, found = scores_n[order], np.cumsum(is_positive_n[order], dtype=np.float64)
    if len(found) == 0 or found[-1] == 0:
        return float("nan")
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # last place of each run of equal scores
    recall = found[ends] / found[-1]
    precision = found[ends] / (ends + 1.0)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def average_precisions(is_positive_nC: np.ndarray, scores_nC: np.ndarray) -> np.ndarray:
    """`average_precision` of each class, float64 [C]; NaN for a class without a positive."""
    columns = zip(is_positive_nC.T, scores_nC.T, strict=True)
    return np.array([average_precision(is_positive, scores) for is_positive, scores in columns], dtype=np.float64)
