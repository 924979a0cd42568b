"""Features and centers to label shards: every image's nearest centers.

Shapes: n images of a shard, k centers, d dimensions, l labels an image.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.nearest import index_of
from mlcd_ds.config import AssignConfig
from mlcd_ds.data.centers import Centers
from mlcd_ds.data.labels import LabelsInfo, label_path, read_label_info, read_label_shard, write_label_shard
from mlcd_ds.errors import DataError
from mlcd_ds.files import make_folder, sha256, write_json
from mlcd_ds.topology import Topology


@dataclass(frozen=True)
class AssignSummary:
    """Of this rank: images labelled now, shards finished before, mean cosine of the nearest and of the last label,
    mean number of labels an image."""

    images: int
    already: int
    nearest: float
    last: float
    labels_per_image: float


def assign_labels(config: AssignConfig, topology: Topology) -> AssignSummary:
    """Writes the label shards of all features, each rank every W-th; finished ones are left as they are.

    `labels.json` in the folder says what all its shards were made with. Raises DataError when features and centers are
    not of one model, the centers are damaged, fewer centers are there than labels asked for, or the folder holds labels of
    other centers or settings.
    """
    features, centers = FeatureFolder(config.features), load_checked_centers(config.centers)
    if (features.model, features.dim) != (centers.feature_model, centers.array.shape[1]):
        raise DataError(
            f"the features in {config.features} are of {features.model!r} with {features.dim} dimensions, the centers in "
            f"{config.centers} of {centers.feature_model!r} with {centers.array.shape[1]}: labels need features of the "
            "model that was clustered"
        )
    k = len(centers.array)
    if config.top > k:
        raise DataError(f"--top {config.top} is more than the {k} centers in {config.centers}")
    info = LabelsInfo(k, config.top, centers.hash, features.model)
    own = range(topology.rank, len(features.names), topology.world_size)
    todo = [i for i in own if not _is_finished(config.output_dir, features.names[i], info, features.rows[i])]
    _claim(Path(config.output_dir), info, config, topology)
    index = index_of(centers.array, config.assign, topology.device, config.nprobe) if todo else None
    images, nearest, last, labels = 0, 0.0, 0.0, 0
    with tqdm(
        total=sum(features.rows[i] for i in own), desc="labels", unit="image", disable=not topology.is_main
    ) as bar:
        bar.update(sum(features.rows[i] for i in own) - sum(features.rows[i] for i in todo))
        for i in todo:
            name = features.names[i]
            cosine_nl, label_nl = _search(features, name, features.rows[i], index, config, bar)
            write_label_shard(
                label_path(config.output_dir, name), features.keys(name), label_nl, cosine_nl.astype(np.float16), info
            )
            there = label_nl != NO_LABEL
            images += len(label_nl)
            labels += int(there.sum())
            nearest += float(cosine_nl[:, 0].sum(dtype=np.float64))
            last += float(
                np.where(there, cosine_nl, np.inf).min(axis=1, initial=np.inf)[there.any(1)].sum(dtype=np.float64)
            )
    count = max(images, 1)
    return AssignSummary(images, len(own) - len(todo), nearest / count, last / count, labels / count)


CENTERS_AT_A_TIME = 16_384
"""Of the exact search that verifies: 100 MB at 768 dimensions in float64."""


def recall(config: AssignConfig) -> float:
    """Share of the exact `top` nearest centers, in float64, that the label shards have, over `verify` random images.

    Labels below the threshold are not missed. Raises DataError for label shards that are not there.
    """
    features, centers = FeatureFolder(config.features), Centers.load(config.centers)
    generator = np.random.default_rng(config.seed)
    counts = np.asarray(features.rows)
    shares = generator.multivariate_hypergeometric(counts, min(config.verify, int(counts.sum())), method="marginals")
    found = expected = 0
    for name, rows, share in zip(features.names, features.rows, shares, strict=True):
        if not share:
            continue
        chosen = np.sort(generator.choice(rows, share, replace=False, shuffle=False))
        unit = features.unit_rows(name, 0, share, chosen).astype(np.float64)
        cosine_nl, label_nl = _exact(unit, centers.array, config.top)
        shard = read_label_shard(label_path(config.output_dir, name))
        place = {key: row for row, key in enumerate(shard.keys)}
        keys = features.keys(name)
        for row, cosine_l, label_l in zip(chosen, cosine_nl, label_nl, strict=True):
            wanted = set(label_l[cosine_l >= (-2 if config.threshold is None else config.threshold)].tolist())
            stored = set(shard.labels[place[keys[row]]].tolist())
            found, expected = found + len(wanted & stored), expected + len(wanted)
    return found / max(expected, 1)


def _exact(unit_nd: np.ndarray, centers_kd: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, labels) [n, top] in float64, a block of centers at a time."""
    cosines, labels = np.full((len(unit_nd), 0), -2.0), np.zeros((len(unit_nd), 0), np.int64)
    for start in range(0, len(centers_kd), CENTERS_AT_A_TIME):
        block = np.asarray(centers_kd[start : start + CENTERS_AT_A_TIME], np.float64)
        cosines = np.concatenate([cosines, unit_nd @ block.T], axis=1)
        numbers = np.broadcast_to(np.arange(start, start + len(block)), (len(unit_nd), len(block)))
        labels = np.concatenate([labels, numbers], axis=1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
        cosines, labels = np.take_along_axis(cosines, best, 1), np.take_along_axis(labels, best, 1)
    return cosines, labels


def load_checked_centers(path: str | Path) -> Centers:
    """`Centers.load`; raises DataError also when centers.npy is not the file that centers.json was written for."""
    centers = Centers.load(path)
    file = Path(path) / "centers.npy"
    if file.is_file() and sha256(file) != centers.hash:
        raise DataError(
            f"{file} is not the file that centers.json beside it describes (its SHA-256 differs): changed or damaged. "
            "Remove the folder and cluster again."
        )
    return centers


def _claim(folder: Path, info: LabelsInfo, config: AssignConfig, topology: Topology) -> None:
    """A label file itself does not say which threshold it was made with; this file does."""
    file = folder / "labels.json"
    now = {"centers_hash": info.centers_hash, "feature_model": info.feature_model}
    now |= {"top": config.top, "threshold": config.threshold}
    try:
        before = json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise DataError(f"{file} cannot be read ({error}). Remove it if the labels beside it are yours.") from None
    if before is not None and before != now:
        raise DataError(
            f"{folder} holds labels made with other settings ({before} then, {now} now). Choose another --output_dir, or "
            "remove that folder."
        )
    if before is None and topology.is_main:
        make_folder(folder)
        write_json(file, now)


def _is_finished(folder: str, name: str, info: LabelsInfo, rows: int) -> bool:
    """Raises DataError for labels of other centers: they are somebody's, and not to be mixed with these."""
    path = label_path(folder, name)
    if not path.exists():
        return False
    try:
        found, found_rows = read_label_info(path)
    except DataError as error:
        raise DataError(f"{error} Remove that file first: it is in the way.") from None
    if found != info:
        raise DataError(
            f"{path} holds labels of other centers or another --top ({found} there, {info} now). Choose another "
            "--output_dir, or remove that folder."
        )
    return found_rows == rows


def _search(features: FeatureFolder, name: str, rows: int, index, config: AssignConfig, bar):
    """(cosines float32, labels int32), both [n, l], nearest first; below the threshold NO_LABEL with cosine 0."""
    cosines = np.zeros((rows, config.top), np.float32)
    labels = np.zeros((rows, config.top), np.int32)
    for start in range(0, rows, config.batch_size):
        stop = min(start + config.batch_size, rows)
        cosines[start:stop], labels[start:stop] = index.search(features.unit_rows(name, start, stop), config.top)
        bar.update(stop - start)
    if config.threshold is not None:
        below = cosines < config.threshold
        cosines[below], labels[below] = 0, NO_LABEL
    return cosines, labels
