"""Linear probe: what a logistic regression on frozen features knows of the true classes.

Protocol, stated in every result (Radford et al. 2021, appendix A.3): logistic regression by L-BFGS in float64, at most 1000
iterations, features as they are (before the projection, neither normalised nor standardised), lambda chosen on a validation
part by a log-spaced sweep that grows finer round the best, refit on all training images. Sets of one class an image: softmax
over the classes (for two classes the logistic loss, as scikit-learn has it). Sets of several: one regression a class against
the rest, one lambda for all.

Shapes: n images, C classes.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch

from mlcd_ds.config import ProbeConfig
from mlcd_ds.errors import DataError
from mlcd_ds.evaluation.datasets import METRICS, ONE_VS_REST
from mlcd_ds.evaluation.features import LabelledFeatures, class_matrix
from mlcd_ds.evaluation.logistic import LogisticRegressions
from mlcd_ds.evaluation.metrics import (
    average_precisions,
    eleven_point_precision,
    mean_per_class_recall,
    roc_auc,
    top_k_accuracy,
)
from mlcd_ds.evaluation.results import Result
from mlcd_ds.evaluation.sets import Evaluated, Task, evaluate_sets
from mlcd_ds.evaluation.softmax import SoftmaxRegressions
from mlcd_ds.topology import Topology

TASK = "linear_probe"
SWEEP_TOLERANCE_FACTOR = 100
"""The sweep only ranks lambdas: it is solved this much less tightly than the last fit."""
PROTOCOL = (
    "CLIP A.3: {loss}, L-BFGS, float64, features as they are, lambda (= 1 / C of scikit-learn) picked by validation "
    "{metric}, refit on train + validation"
)


def probe(config: ProbeConfig, device: torch.device) -> Result:
    """Probes one model on --train_shards and --test_shards; returns (and with `config.output` writes) the result.

    Raises DataError for images without true classes, features without keys, or no class to report on.
    """
    (result,) = probe_sets(config, Topology.single(device)).results.values()
    return result


def probe_sets(config: ProbeConfig, topology: Topology) -> Evaluated:
    """Probes one model on every set that `config` names."""
    return evaluate_sets(config, topology, TASK, probe_set)


def probe_set(task: Task) -> Result:
    """Probes one set. Raises DataError as `probe` does."""
    started, config = time.monotonic(), task.config
    train, test = task.read("train"), task.read("test")
    validation = task.read("val") if "val" in task.set.shards else None
    held = validation.classes if validation else []
    metric = metric_of(config, task, [*train.classes, *held, *test.classes])
    kind = OneVsRest if metric in ONE_VS_REST else OneClass
    problem = kind(metric, [train.classes, held, test.classes], config, task.device)
    features, fitted, held_out = _split(config, train, validation)
    problem.check(fitted, held_out)
    chosen, curve, solver = problem.choose_lambda(features, fitted, held_out)
    metrics, details = problem.fit_and_score(features, test.features, chosen)
    known = task.set.known
    if known is not None and known.num_classes not in (None, len(problem.names)):
        details["classes_in_clips_table"] = known.num_classes
    return task.result(
        TASK,
        {f"lp_{name}": value for name, value in metrics.items()},
        {
            "main_metric": f"lp_{METRICS[metric]}",
            "protocol": PROTOCOL.format(loss=problem.loss, metric=METRICS[metric]),
            "lambda": chosen,
            "lambda_curve": {f"{value:.6g}": score for value, score in sorted(curve.items())},
            "sweep_not_converged": solver,
            "validation": "val/" if validation else f"{config.validation_fraction:g} of the training images, drawn",
            "num_classes": len(problem.names),
            "n_train": len(train.classes),
            "n_validation": len(held_out),
            "n_test": len(test.classes),
            "skipped": {
                name: part.skipped for name, part in (("train", train), ("val", validation), ("test", test)) if part
            },
            "feature_dim": train.features.shape[1],
            "seconds": round(time.monotonic() - started, 2),
            **details,
        },
    )


def metric_of(config: ProbeConfig, task: Task, classes: list[tuple[int, ...]]) -> str:
    """Name in METRICS of what a set is reported by. Raises DataError where the images' classes do not allow it."""
    asked = config.metric if config.metric != "auto" else task.set.metric
    several = sum(len(found) != 1 for found in classes)
    if asked is None:
        return "mean_average_precision" if several else "accuracy"
    if several and asked not in ONE_VS_REST:
        raise DataError(
            f"{task.set.name} is reported by {asked}, which wants one class an image, but {several} of "
            f"{len(classes)} images have none or several. Take --metric mean_average_precision, or mend the set."
        )
    return asked


def _split(config: ProbeConfig, train: LabelledFeatures, validation: LabelledFeatures | None):
    """(features of train + validation [n, d], rows to fit the sweep on, rows to judge it by)."""
    n = len(train.classes)
    if validation is not None:
        features = np.concatenate([train.features, validation.features])
        return features, np.arange(n), np.arange(n, len(features))
    order = np.random.default_rng(config.seed).permutation(n)
    held = round(n * config.validation_fraction)
    return train.features, order[held:], order[:held]


class _Problem:
    """What one set asks: its classes, its regression, its figures of merit. Row numbers are of train + validation."""

    loss: str

    def __init__(self, metric: str, classes: list, config: ProbeConfig, device: torch.device):
        train, held, test = classes
        self.metric, self.config, self.device = metric, config, device
        self.names = sorted({name for found in (*train, *held, *test) for name in found})
        self.train_nC = class_matrix([*train, *held], self.names)
        self.test_nC = class_matrix(test, self.names)
        if not (self.test_nC.any(axis=0) & self.train_nC.any(axis=0)).any():
            raise DataError(
                f"no class has both a training and a test image ({len(self.names)} classes in all): do --train_shards and "
                "--test_shards belong together?"
            )

    def check(self, fitted: np.ndarray, held_out: np.ndarray) -> None:
        """Raises DataError where no lambda can be chosen."""
        if len(held_out) == 0 or not (self.train_nC[held_out].any(axis=0) & self.train_nC[fitted].any(axis=0)).any():
            raise DataError(
                f"{len(self.train_nC)} training images are too few: with --validation_fraction "
                f"{self.config.validation_fraction:g}, no class has an image in both parts"
            )

    def choose_lambda(self, features_nd: np.ndarray, fitted: np.ndarray, held_out: np.ndarray):
        """(lambda of the highest validation score, {lambda: score} of all that were tried, how many fits of these did
        not converge)."""
        config, unfinished = self.config, []
        scores = self.scorer(
            features_nd[fitted], fitted, features_nd[held_out], config.tolerance * SWEEP_TOLERANCE_FACTOR
        )

        def evaluate(lambdas: list[float]) -> list[float]:
            found, converged = scores(lambdas)
            unfinished.append(int((~converged).sum()))
            values = [self.merit(self.train_nC[held_out], scores_nC)[METRICS[self.metric]] for scores_nC in found]
            if any(math.isnan(value) for value in values):  # of lambdas without a score none is the best
                raise DataError(
                    f"the {len(held_out)} validation images have no {METRICS[self.metric]} ({self._needed()}): no lambda "
                    "can be chosen. Take another --metric, or take val/ out of the set: a share of train/ then picks lambda"
                )
            return values

        chosen, curve = search(
            evaluate, config.lambda_min, config.lambda_max, config.lambda_coarse, config.lambda_halvings
        )
        return chosen, curve, sum(unfinished)

    def fit_and_score(self, features_nd: np.ndarray, test_md: np.ndarray, chosen: float) -> tuple[dict, dict]:
        """(metrics on the test images, details) of a fit on all training images."""
        rows = np.arange(len(features_nd))
        found, converged = self.scorer(features_nd, rows, test_md, self.config.tolerance)([chosen])
        (scores_nC,) = found
        untrained = [name for name, there in zip(self.names, self.train_nC.any(axis=0), strict=True) if not there]
        untested = [name for name, there in zip(self.names, self.test_nC.any(axis=0), strict=True) if not there]
        details = {
            "classes_without_test_image": untested,
            "classes_without_train_image": untrained,
            "not_converged": int((~converged).sum()),
        }
        return self.merit(self.test_nC, scores_nC), details | self.per_class(scores_nC)

    def _needed(self) -> str:
        """What images must have for the metric, in words."""
        return {
            "roc_auc": "it wants images of both classes among them",
            "top1_top5": f"its top 5 wants five classes, there are {len(self.names)}",
        }.get(self.metric, "it wants an image of a class")

    def scorer(self, features_nd, rows, test_md, tolerance) -> Callable:
        """A function of lambdas: (scores [m, C] of the rows of test_md for each, whether each fit converged)."""
        raise NotImplementedError

    def merit(self, truth_nC: np.ndarray, scores_nC: np.ndarray) -> dict[str, float]:
        """Figures of merit by name."""
        raise NotImplementedError

    def per_class(self, scores_nC: np.ndarray) -> dict:
        """Details of the test images."""
        raise NotImplementedError


class OneClass(_Problem):
    """Every image has one class. A class without a training image is never predicted."""

    loss = "softmax regression (logistic for two classes)"

    def scorer(self, features_nd, rows, test_md, tolerance):
        """See `_Problem.scorer`."""
        present = np.flatnonzero(self.train_nC[rows].any(axis=0))
        index_n = np.searchsorted(present, self.train_nC[rows].argmax(axis=1))
        C, iterations = len(present), self.config.max_iterations
        if C == 2:
            pair = LogisticRegressions(features_nd, self.device)
        elif C > 2:
            many = SoftmaxRegressions(features_nd, index_n, C, self.device)

        def scores(lambdas: list[float]):
            if C == 1:
                part = (np.zeros((len(test_md), 1)) for _ in lambdas)
                return (self._spread(one, present) for one in part), np.ones(len(lambdas), bool)
            if C == 2:
                fit = pair.fit(
                    index_n[:, None] == 1, np.zeros(len(lambdas), int), np.array(lambdas), iterations, tolerance
                )
                second_mP = fit.scores(test_md)
                part = (np.stack([-column, column], 1) for column in second_mP.T)
                return (self._spread(one, present) for one in part), fit.converged
            fit = many.fit(np.array(lambdas), iterations, tolerance)
            part = (fit.scores(test_md, p) for p in range(len(lambdas)))
            return (self._spread(one, present) for one in part), fit.converged

        return scores

    def _spread(self, scores_mc: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Scores of all C classes: -inf for those without a training image."""
        if len(present) == len(self.names):
            return scores_mc
        spread = np.full((len(scores_mc), len(self.names)), -np.inf)
        spread[:, present] = scores_mc
        return spread

    def merit(self, truth_nC, scores_nC):
        """acc1, acc5 (of five classes or more), mean per class, and what the set asks for beside."""
        truth_n = truth_nC.argmax(axis=1)
        acc1 = top_k_accuracy(truth_n, scores_nC, 1)
        acc5 = top_k_accuracy(truth_n, scores_nC, 5) if scores_nC.shape[1] >= 5 else float("nan")
        found = {
            "acc1": acc1,
            "acc5": acc5,
            "mean_per_class_recall": mean_per_class_recall(truth_n, scores_nC.argmax(1)),
        }
        if self.metric == "top1_top5":
            found["mean_of_acc1_and_acc5"] = (acc1 + acc5) / 2
        if self.metric == "roc_auc":
            if scores_nC.shape[1] != 2:
                raise DataError(
                    f"roc_auc wants two classes, the images have {scores_nC.shape[1]}: take --metric accuracy"
                )
            found["roc_auc"] = roc_auc(truth_n == 1, scores_nC[:, 1])
        return found

    def per_class(self, scores_nC):
        """Recall of each class."""
        truth_n, right_n = self.test_nC.argmax(axis=1), scores_nC.argmax(1)
        recall = {}
        for c, name in enumerate(self.names):
            own = truth_n == c
            recall[str(name)] = float((right_n[own] == c).mean()) if own.any() else None
        return {"per_class_recall": recall}


class OneVsRest(_Problem):
    """An image may have any number of classes."""

    loss = "one-vs-rest logistic regression, one lambda for all classes"

    def scorer(self, features_nd, rows, test_md, tolerance):
        """See `_Problem.scorer`."""
        regressions, classes = LogisticRegressions(features_nd, self.device), np.arange(len(self.names))

        def scores(lambdas: list[float]):
            fit = regressions.fit(
                self.train_nC[rows],
                np.tile(classes, len(lambdas)),
                np.repeat(lambdas, len(classes)),
                self.config.max_iterations,
                tolerance,
            )
            return np.split(fit.scores(test_md), len(lambdas), axis=1), fit.converged

        return scores

    def _precisions(self, truth_nC, scores_nC) -> np.ndarray:
        if self.metric == "mean_average_precision":
            return average_precisions(truth_nC, scores_nC)
        columns = zip(truth_nC.T, scores_nC.T, strict=True)
        return np.array([eleven_point_precision(truth_n, scores_n) for truth_n, scores_n in columns])

    def merit(self, truth_nC, scores_nC):
        """The mean over the classes that have an image."""
        return {METRICS[self.metric]: float(np.nanmean(self._precisions(truth_nC, scores_nC)))}

    def per_class(self, scores_nC):
        """Average precision of each class."""
        precisions = zip(self.names, self._precisions(self.test_nC, scores_nC), strict=True)
        return {"per_class_AP": {str(name): None if math.isnan(ap) else float(ap) for name, ap in precisions}}


def search(
    evaluate: Callable[[list[float]], list[float]], low: float, high: float, coarse: int, halvings: int
) -> tuple[float, dict[float, float]]:
    """(best value, {value: score} of all tried) on a log-spaced grid that is refined round its best.

    First `coarse` values from low to high, then the two neighbours of the best at half the spacing, `halvings` times.
    Among equals the largest value wins: the strongest regularisation.
    """
    logs = np.linspace(math.log(low), math.log(high), coarse)
    spacing = logs[1] - logs[0] if coarse > 1 else 0.0
    scores = dict(zip(logs.tolist(), evaluate(np.exp(logs).tolist()), strict=True))

    def best() -> float:
        return max(scores, key=lambda value: (scores[value], value))

    for _ in range(halvings if spacing > 0 else 0):
        spacing /= 2
        middle = best()
        near = [value for value in (middle - spacing, middle + spacing) if logs[0] <= value <= logs[-1]]
        scores.update(zip(near, evaluate(np.exp(near).tolist()), strict=True))
    return math.exp(best()), {math.exp(value): score for value, score in scores.items()}
