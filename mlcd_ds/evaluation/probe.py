"""Linear probe: what a logistic regression on frozen features knows of the true classes, as mean average precision.

Protocol, stated in every result: one-vs-rest logistic regression by L-BFGS in float64, features as they are (neither
normalised nor standardised), one lambda for all classes, chosen on a validation part of the training images by a
log-spaced sweep that grows finer round the best, refit on all training images (Radford et al. 2021, appendix A.3, with mean
average precision instead of accuracy, for images have several classes).

Shapes: n images, C classes.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mlcd_ds import checkpoint
from mlcd_ds.config import ProbeConfig
from mlcd_ds.data.tars import expand_shards, is_url
from mlcd_ds.errors import DataError
from mlcd_ds.evaluation.features import class_matrix, feature_folders, read_features, split_model
from mlcd_ds.evaluation.logistic import LogisticRegressions
from mlcd_ds.evaluation.metrics import average_precisions
from mlcd_ds.files import write_json

SWEEP_TOLERANCE_FACTOR = 100
"""The sweep only ranks lambdas: it is solved this much less tightly than the last fit."""
PROTOCOL = (
    "one-vs-rest logistic regression, L-BFGS, float64, features as they are, one lambda (= 1 / C of scikit-learn) for all "
    "classes, picked by validation mAP, refit on train + validation"
)


def probe(config: ProbeConfig, device: torch.device) -> dict:
    """Probes one model; returns (and with `config.output` writes) the result.

    Raises DataError for images without true classes, features without keys, or no class to report on.
    """
    started = time.monotonic()
    train, test = (read_features(config, split, device) for split in ("train", "test"))
    names = sorted({name for found in (*train.classes, *test.classes) for name in found})
    train_nC, test_nC = class_matrix(train.classes, names), class_matrix(test.classes, names)
    if not (test_nC.any(axis=0) & train_nC.any(axis=0)).any():
        raise DataError(
            f"no class has both a training and a test image ({len(names)} classes in all): do --train_shards and "
            "--test_shards belong together?"
        )
    chosen, curve = choose_lambda(config, train.features, train_nC)
    lambdas = np.full(len(names), chosen)
    fit = LogisticRegressions(train.features).fit(
        train_nC, np.arange(len(names)), lambdas, config.max_iterations, config.tolerance
    )
    per_class = average_precisions(test_nC, fit.scores(test.features))
    result = {
        "model": config.model,
        "dataset": config.test_shards,
        "mAP": float(np.nanmean(per_class)),
        "per_class_AP": {
            str(name): None if math.isnan(ap) else float(ap) for name, ap in zip(names, per_class, strict=True)
        },
        "classes_without_test_image": [name for name, ap in zip(names, per_class, strict=True) if math.isnan(ap)],
        "classes_without_train_image": [
            name for name, any_ in zip(names, train_nC.any(axis=0), strict=True) if not any_
        ],
        "lambda": chosen,
        "lambda_curve": {f"{value:.6g}": score for value, score in sorted(curve.items())},
        "not_converged": int((~fit.converged).sum()),
        "n_train": len(train.classes),
        "n_test": len(test.classes),
        "skipped": {"train": train.skipped, "test": test.skipped},
        "feature_dim": train.features.shape[1],
        "protocol": PROTOCOL,
        "seconds": round(time.monotonic() - started, 2),
        "settings": config.model_dump(),
    }
    if config.output is not None:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    return result


def choose_lambda(config: ProbeConfig, features_nd: np.ndarray, is_positive_nC: np.ndarray) -> tuple[float, dict]:
    """(lambda of the highest validation mAP, {lambda: mAP} of all that were tried)."""
    n = len(features_nd)
    order = np.random.default_rng(config.seed).permutation(n)
    held = round(n * config.validation_fraction)
    validation, fitted = order[:held], order[held:]
    if held == 0 or not (is_positive_nC[validation].any(axis=0) & is_positive_nC[fitted].any(axis=0)).any():
        raise DataError(
            f"{n} training images are too few: with --validation_fraction {config.validation_fraction:g}, no class has an "
            "image in both parts"
        )
    regressions = LogisticRegressions(features_nd[fitted])
    classes = np.arange(is_positive_nC.shape[1])

    def evaluate(lambdas: list[float]) -> list[float]:
        fit = regressions.fit(
            is_positive_nC[fitted],
            np.tile(classes, len(lambdas)),
            np.repeat(lambdas, len(classes)),
            config.max_iterations,
            config.tolerance * SWEEP_TOLERANCE_FACTOR,
        )
        scores = fit.scores(features_nd[validation])
        parts = np.split(scores, len(lambdas), axis=1)
        return [float(np.nanmean(average_precisions(is_positive_nC[validation], part))) for part in parts]

    return search(evaluate, config.lambda_min, config.lambda_max, config.lambda_coarse, config.lambda_halvings)


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


def finished_result(config: ProbeConfig) -> dict | None:
    """The result in `config.output`, if these settings made it after all its inputs were written; else None."""
    if config.output is None or not Path(config.output).is_file():
        return None
    try:
        result = json.loads(Path(config.output).read_text(encoding="utf-8"))
        if result["settings"] != config.model_dump() or not math.isfinite(result["mAP"]):
            return None
    except (ValueError, KeyError, TypeError):
        return None
    written = Path(config.output).stat().st_mtime
    return result if all(path.stat().st_mtime <= written for path in _inputs(config)) else None


def _inputs(config: ProbeConfig) -> list[Path]:
    """Local files a result depends on."""
    specs = (config.train_shards, config.test_shards)
    shards = [shard for spec in specs for shard in expand_shards(spec, config.allow_pipe)]
    files = [Path(shard) for shard in shards if not is_url(shard)]
    kind, value = split_model(config.model)
    if kind in ("run", "untrained"):
        folder = checkpoint.find_encoder(value)
        # An untrained twin depends on the architecture alone.
        files.append(folder / ("encoder.safetensors" if kind == "run" else "encoder.json"))
    elif kind == "features":
        files += [file for folder in feature_folders(value) for file in sorted(folder.glob("*/*"))]
    elif Path(value).exists():
        files.append(Path(value))
    return files
