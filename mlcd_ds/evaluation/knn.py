"""Weighted nearest neighbours: how often an image's nearest training images are of its class.

The k training features of highest cosine to a test feature vote, each with exp(cosine / temperature) votes for each of
its classes (Wu et al. 2018, arXiv 1805.01978; DINO and UNICOM report it so, with temperature 0.07 and k of 10, 20, 100,
200). The score of a class is its share of all votes. Nothing is fitted, and there is nothing to choose.

The training features pass by in blocks, one tar at a time from the cache, so memory does not grow with their number.

Shapes: n training and m test images, d feature width, C classes, k neighbours, r rows of a block.
"""

import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from mlcd_ds.config import KnnConfig
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.features import check_finite, check_usable, class_matrix, shard_parts
from mlcd_ds.evaluation.metrics import average_precisions, mean_per_class_recall, top_k_accuracy
from mlcd_ds.evaluation.results import Result
from mlcd_ds.evaluation.sets import Evaluated, Task, evaluate_sets
from mlcd_ds.topology import Topology

TASK = "knn"
USUAL_K = 20
"""The k that a table shows, where it is among those asked for."""
QUERY_ROWS = 4096
"""Test images whose cosines to a block exist at one time."""
PROTOCOL = "weighted kNN: share of votes exp(cosine / temperature), features before the projection"


def knn_sets(config: KnnConfig, topology: Topology) -> Evaluated:
    """Evaluates one model on every set that `config` names."""
    neighbour_counts(config)  # before hours of features
    return evaluate_sets(config, topology, TASK, knn_set)


def neighbour_counts(config: KnnConfig) -> list[int]:
    """The numbers in --k, rising. Raises ConfigError for anything else."""
    try:
        counts = sorted({int(part) for part in config.k.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ConfigError(f"--k {config.k!r}: expected whole numbers above 0, joined by commas, like 10,20,100,200")
    return counts


def knn_set(task: Task) -> Result:
    """Evaluates one set. Raises DataError for images that cannot be used, and features of length 0."""
    started, config = time.monotonic(), task.config
    test = task.read("test")
    counts, skipped, classes = neighbour_counts(config), Counter(), []
    splits = [split for split in ("train", "val") if split in task.set.shards]

    def blocks() -> Iterator[np.ndarray]:
        for split in splits:
            for features, found, lost in shard_parts(config, task.encoder, task.cache, task.set.shards[split], split):
                skipped.update(lost)
                classes.extend(found)
                if len(features):
                    check_finite(config, split, features)
                    yield features

    search = NearestRows(test.features, counts[-1], task.device, config.block_rows)
    for features in blocks():
        search.add(features)
    check_usable(config, "train", len(classes), skipped)
    cosines_mk, rows_mk = search.found()
    names = sorted({name for found in (*classes, *test.classes) for name in found})
    truth_mC = class_matrix(test.classes, names)
    one_each = all(len(found) == 1 for found in (*classes, *test.classes))
    metrics = {}
    for k in counts:
        share_mC = votes(cosines_mk[:, :k], rows_mk[:, :k], classes, names, config.temperature)
        metrics |= {f"knn{k}_{name}": value for name, value in _merit(truth_mC, share_mC, one_each).items()}
    shown = f"knn{USUAL_K if USUAL_K in counts else counts[0]}_{'acc1' if one_each else 'mean_average_precision'}"
    return task.result(
        TASK,
        metrics,
        {
            "main_metric": shown,
            "protocol": f"{PROTOCOL}, neighbours among {' + '.join(splits)}",
            "k_above_n": [k for k in counts if k > len(classes)],
            "num_classes": len(names),
            "n_train": len(classes),
            "n_test": len(test.classes),
            "skipped": {"train": dict(skipped), "test": test.skipped},
            "feature_dim": test.features.shape[1],
            "seconds": round(time.monotonic() - started, 2),
        },
    )


def _merit(truth_mC: np.ndarray, share_mC: np.ndarray, one_each: bool) -> dict[str, float]:
    if not one_each:
        return {"mean_average_precision": float(np.nanmean(average_precisions(truth_mC, share_mC)))}
    truth_m = truth_mC.argmax(axis=1)
    return {
        "acc1": top_k_accuracy(truth_m, share_mC, 1),
        "acc5": top_k_accuracy(truth_m, share_mC, 5) if share_mC.shape[1] >= 5 else float("nan"),
        "mean_per_class_recall": mean_per_class_recall(truth_m, share_mC.argmax(axis=1)),
    }


class NearestRows:
    """The k nearest of any number of rows, which come in blocks, to each of m queries. Memory: O(m (d + k) + r (d +
    q)), q the smaller of m and QUERY_ROWS; cosines in float32.
    """

    def __init__(self, queries_md: np.ndarray, k: int, device: torch.device, block_rows: int):
        self._queries_md, self._device = _unit(queries_md, "test").to(device), device
        self._k, self._block_rows, self._rows = k, block_rows, 0
        m = len(queries_md)
        self._cosines_mk = torch.zeros(m, 0, device=device)
        self._places_mk = torch.zeros(m, 0, dtype=torch.int64, device=device)

    def add(self, features_nd: np.ndarray) -> None:
        """More rows, numbered on from those before. Raises DataError for rows of length 0 or of another width."""
        if features_nd.shape[1] != self._queries_md.shape[1]:
            raise DataError(
                f"training features have {features_nd.shape[1]} dimensions, test features {self._queries_md.shape[1]}: they "
                "are of different models"
            )
        for start in range(0, len(features_nd), self._block_rows):
            block_rd = _unit(features_nd[start : start + self._block_rows], "training").to(self._device)
            found = [self._nearest(part, block_rd) for part in self._queries_md.split(QUERY_ROWS)]
            cosines = torch.cat([self._cosines_mk, torch.cat([cosines for cosines, _ in found])], dim=1)
            places = torch.cat([self._places_mk, torch.cat([places for _, places in found]) + self._rows], dim=1)
            # Stable, and earlier rows stand first: of equal cosines the first row wins.
            order = cosines.argsort(dim=1, descending=True, stable=True)[:, : self._k]
            self._cosines_mk, self._places_mk = cosines.gather(1, order), places.gather(1, order)
            self._rows += len(block_rd)

    def _nearest(self, queries_qd: torch.Tensor, block_rd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosines_qr = queries_qd @ block_rd.T
        return cosines_qr.topk(min(self._k, len(block_rd)), dim=1)

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """(cosines float32, row numbers int64), both [m, min(k, n)], highest cosine first."""
        return self._cosines_mk.cpu().numpy(), self._places_mk.cpu().numpy()


def _unit(features_nd: np.ndarray, what: str) -> torch.Tensor:
    features = torch.from_numpy(np.ascontiguousarray(features_nd)).float()
    lengths = features.norm(dim=1, keepdim=True)
    if (lengths == 0).any():
        raise DataError(
            f"{int((lengths == 0).sum())} {what} features are all zeros and have no direction: extract them again, or take "
            "another checkpoint"
        )
    return features / lengths


def votes(
    cosines_mk: np.ndarray, rows_mk: np.ndarray, classes: list[tuple[int, ...]], names: list[int], temperature: float
) -> np.ndarray:
    """Share of the votes that each class gets, float64 [m, C]. classes: of each training row; names: of the columns."""
    column = {name: c for c, name in enumerate(names)}
    counts_n = np.fromiter(map(len, classes), np.int64, len(classes))
    flat = np.fromiter((column[name] for found in classes for name in found), np.int64, int(counts_n.sum()))
    starts_n = np.concatenate([[0], counts_n.cumsum()])
    cosines = cosines_mk.astype(np.float64)
    weights_mk = np.exp((cosines - cosines[:, :1]) / temperature)  # relative to the nearest: only shares matter
    share_mC = np.zeros((len(cosines_mk), len(names)))
    image = np.arange(len(cosines_mk))
    for j in range(cosines_mk.shape[1]):
        row_m, weight_m = rows_mk[:, j], weights_mk[:, j]
        for place in range(int(counts_n[row_m].max(initial=0))):
            has = counts_n[row_m] > place
            share_mC[image[has], flat[starts_n[row_m[has]] + place]] += weight_m[has]
    return share_mC / weights_mk.sum(axis=1, keepdims=True)
