"""Zero-shot classification: an image is of the class whose name, put into sentences, is embedded nearest to it.

A class's embedding is the mean of the unit embeddings of all templates with its name, made a unit vector again (CLIP,
Radford et al. 2021, section 3.1.4: an ensemble of prompts in embedding space). Class names and templates come from the
set's own classnames.txt and zeroshot_classification_templates.txt ("a photo of a {c}."), as in CLIP_benchmark.

Shapes: n images, C classes, P templates, D width of the joint embedding.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mlcd_ds import collectives
from mlcd_ds.config import ZeroShotConfig
from mlcd_ds.errors import DataError
from mlcd_ds.evaluation.datasets import dataset_type
from mlcd_ds.evaluation.features import CLASS_EXTENSIONS, check_usable, class_matrix, true_classes
from mlcd_ds.evaluation.metrics import average_precisions, mean_per_class_recall, top_k_accuracy
from mlcd_ds.evaluation.results import Result
from mlcd_ds.evaluation.towers import TestSet, Towers, embed_distinct, embedded_batches, own_share, read_lines
from mlcd_ds.topology import Topology

TASK = "zeroshot_classification"
CLASSES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
PLACE = "{c}"
PROTOCOL = "cosine to the mean of the unit embeddings of all templates, central crops"


def class_embeddings(
    towers: Towers, names: Sequence[str], templates: Sequence[str], batch_size: int, topology: Topology
) -> torch.Tensor:
    """float32 [C, D], unit rows: each class's ensemble of templates. Every rank makes a share and gets all."""
    own = own_share(range(len(names)), topology)

    def own_part() -> tuple[list[int], np.ndarray]:
        if not own:
            return own, np.zeros((0, 0), np.float32)
        texts = [template.replace(PLACE, names[c]) for c in own for template in templates]
        embedded = embed_distinct(towers, texts, batch_size, "classes", topology.is_main)
        return own, ensemble(embedded.view(len(own), len(templates), -1)).numpy()

    gathered = collectives.all_for_long(topology, own_part)
    width = max(part.shape[1] for _, part in gathered)
    whole = np.zeros((len(names), width), np.float32)
    for rows, part in gathered:
        if rows:
            whole[rows] = part
    return torch.from_numpy(whole)


def ensemble(embedded_CPD: torch.Tensor) -> torch.Tensor:
    """[C, D]: unit rows in the direction of the mean over the templates."""
    return torch.nn.functional.normalize(embedded_CPD.mean(dim=1), dim=1)


def zero_shot_set(config: ZeroShotConfig, tested: TestSet, towers: Towers, topology: Topology) -> Result:
    """Evaluates one set; every rank takes a share of its tars. Raises DataError for what is missing or does not fit."""
    started = time.monotonic()
    names, templates = read_classes(config, tested.folder)
    classes_CD = class_embeddings(towers, names, templates, config.batch_size, topology)
    single = dataset_type(tested.folder) != "multilabel"

    def own_part() -> tuple[list[np.ndarray], list[tuple[int, ...]], Counter]:
        scores, truth, skipped = [], [], Counter()
        for batch in embedded_batches(
            config, towers, own_share(tested.shards, topology), CLASS_EXTENSIONS, skipped, topology.is_main
        ):
            for key, members in zip(batch.keys, batch.parts, strict=True):
                found = true_classes(batch.shard, key, members, config.classes_key)
                if found and found[-1] >= len(names):
                    raise DataError(
                        f"{batch.shard}: image {key} is of class {found[-1]}, but {CLASSES_FILE} of {tested.folder} names "
                        f"{len(names)} (from 0 on): is it the file of this set?"
                    )
                truth.append(found)
            scores.append((batch.features @ classes_CD.T).numpy())
        return scores, truth, skipped

    # Gathered whole: n x C float32 are 200 MB for ImageNet's 50,000 validation images.
    parts = collectives.all_for_long(topology, own_part)
    all_scores = [part for some, _, _ in parts for part in some]
    all_truth = [found for _, some, _ in parts for found in some]
    total = sum((counter for *_, counter in parts), Counter())
    check_usable(config, config.split, len(all_truth), total)
    scores_nC = np.concatenate(all_scores)
    single = single and all(len(found) == 1 for found in all_truth)
    metrics, absent = (_one_class if single else _several_classes)(scores_nC, all_truth, len(names))
    return Result(
        tested.name,
        towers.name,
        config.model,
        TASK,
        metrics,
        config.language,
        {
            "main_metric": "acc1" if single else "mean_average_precision",
            "protocol": PROTOCOL,
            "num_classes": len(names),
            "classes_without_test_image": absent,
            "templates": len(templates),
            "split": config.split,
            "n_test": len(all_truth),
            "skipped": dict(total),
            "seconds": round(time.monotonic() - started, 2),
        },
    )


def files_of_sets(config: ZeroShotConfig) -> list[str]:
    """Files that a set must have: those which no flag replaces."""
    return [CLASSES_FILE] * (config.classnames is None) + [TEMPLATES_FILE] * (config.templates is None)


def read_classes(config: ZeroShotConfig, folder: Path) -> tuple[list[str], list[str]]:
    """(class names, templates). Raises DataError where a file is missing, or a template has no place for the name."""
    names = read_lines(
        Path(config.classnames or folder / CLASSES_FILE),
        "class names",
        "expected the name of class 0, 1, ... a line each; --classnames FILE names another file",
    )
    file = Path(config.templates or folder / TEMPLATES_FILE)
    templates = read_lines(
        file,
        "templates",
        f"expected sentences like 'a photo of a {PLACE}.', a line each; --templates FILE names another file",
    )
    wrong = [template for template in templates if PLACE not in template]
    if wrong:
        raise DataError(
            f"{file}: {len(wrong)} of {len(templates)} templates have no {PLACE} for the name, e.g. {wrong[0]!r}"
        )
    return names, templates


def _one_class(scores_nC: np.ndarray, truth: list[tuple[int, ...]], num_classes: int) -> tuple[dict, int]:
    """(metrics, classes without an image) where each image has one class."""
    truth_n = np.array([found[0] for found in truth])
    metrics = {
        "acc1": top_k_accuracy(truth_n, scores_nC, 1),
        "acc5": top_k_accuracy(truth_n, scores_nC, 5) if num_classes >= 5 else float("nan"),
        "mean_per_class_recall": mean_per_class_recall(truth_n, scores_nC.argmax(axis=1)),
    }
    return metrics, num_classes - len(np.unique(truth_n))


def _several_classes(scores_nC: np.ndarray, truth: list[tuple[int, ...]], num_classes: int) -> tuple[dict, int]:
    """(metrics, classes without an image): mean average precision over the classes that have one."""
    truth_nC = class_matrix(truth, list(range(num_classes)))
    if not truth_nC.any():
        raise DataError("no image is of any class: there is nothing to report on")
    precisions = average_precisions(truth_nC, scores_nC)
    return {"mean_average_precision": float(np.nanmean(precisions))}, int(np.isnan(precisions).sum())
