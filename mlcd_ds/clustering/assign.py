"""Features and centers to label shards: every image's nearest centers.

Shapes: n images of a shard, k centers, d dimensions, l labels an image.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mlcd_ds import collectives
from mlcd_ds.batch import NO_LABEL
from mlcd_ds.clustering.ahead import ahead
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.clustering.nearest import Nearest, index_of
from mlcd_ds.clustering.progress import FolderProgress
from mlcd_ds.clustering.regroup import PieceStore, pieces_of, tar_of
from mlcd_ds.config import AssignConfig
from mlcd_ds.data.centers import Centers
from mlcd_ds.data.labels import (
    LabelsInfo,
    label_path,
    read_dropped,
    read_label_info,
    read_label_shard,
    write_label_shard,
)
from mlcd_ds.errors import DataError
from mlcd_ds.files import make_folder, remove_stale, sha256, write_json
from mlcd_ds.topology import Topology


@dataclass(frozen=True)
class AssignSummary:
    """Of all ranks: images labelled now, shards finished before, mean cosine of the nearest and of the last label, mean
    number of labels an image; dropped: images without usable features, which have no label, of finished shards, too."""

    images: int
    already: int
    nearest: float
    last: float
    labels_per_image: float
    dropped: int = 0


@dataclass
class _Sums:
    """Of one rank."""

    images: int = 0
    already: int = 0
    nearest: float = 0.0
    last: float = 0.0
    labels: int = 0
    labelled: int = 0
    dropped_now: int = 0
    dropped_before: int = 0

    def count(self, cosine_nl: np.ndarray, label_nl: np.ndarray, dropped: int) -> None:
        there = label_nl != NO_LABEL
        self.images += len(label_nl)
        self.labels += int(there.sum())
        self.labelled += int(there[:, 0].sum())
        self.dropped_now += dropped
        self.nearest += float(cosine_nl[:, 0].sum(dtype=np.float64))
        lasts = np.where(there, cosine_nl, np.inf).min(axis=1, initial=np.inf)
        self.last += float(lasts[there[:, 0]].sum(dtype=np.float64))

    def over(self, topology: Topology) -> AssignSummary:
        parts = collectives.gather_objects(self, topology)
        total = _Sums(*(sum(getattr(part, field.name) for part in parts) for field in fields(_Sums)))
        images, labelled = max(total.images - total.dropped_now, 1), max(total.labelled, 1)
        return AssignSummary(
            images=total.images,
            already=total.already,
            nearest=total.nearest / images,
            last=total.last / labelled,
            labels_per_image=total.labels / images,
            dropped=total.dropped_now + total.dropped_before,
        )


def assign_labels(config: AssignConfig, topology: Topology) -> AssignSummary:
    """Writes the label shards of all features, each rank every W-th; finished ones are left as they are.

    `labels.json` in the folder says what all its shards were made with. An image whose features are zero or no numbers is
    refused, or with `drop_bad_rows` stands in its label shard with an empty list: it has no positives.
    Raises DataError when features and centers are not of one model, the centers are damaged, fewer centers are there than
    labels asked for, or the folder holds labels of other centers or settings.
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
    by_tar = _by_key if config.tar_of_key else _by_file
    return by_tar(config, features, centers, info, topology)


def _by_file(
    config: AssignConfig, features: FeatureFolder, centers: Centers, info: LabelsInfo, topology: Topology
) -> AssignSummary:
    """Every features file is one tar's."""
    own = range(topology.rank, len(features.names), topology.world_size)
    todo = [i for i in own if not _is_finished(config.output_dir, features.names[i], info, features.rows[i])]
    collectives.on_main(topology, _claim, Path(config.output_dir), info, config)
    sums = _Sums(already=len(own) - len(todo))
    for i in set(own) - set(todo):
        sums.dropped_before += read_dropped(label_path(config.output_dir, features.names[i]))
    index = index_of(centers.array, config.assign, topology.device, config.nprobe) if todo else None
    files = {label_path("", name).name: name for name in features.names}
    rows = dict(zip(features.names, features.rows, strict=True))
    names = [features.names[i] for i in todo]
    batches = _batches(features, [(name, 0, rows[name]) for name in names], config, topology.device)
    with FolderProgress(
        "labels", topology, Path(config.output_dir), files, rows.__getitem__, features.num_features
    ) as progress:
        for name in names:
            cosine_nl, label_nl, dropped = _search(batches, rows[name], index, config, progress)
            write_label_shard(
                label_path(config.output_dir, name),
                features.keys(name),
                label_nl,
                cosine_nl.astype(np.float16),
                info,
                dropped,
            )
            progress.finish()
            sums.count(cosine_nl, label_nl, dropped)
        return sums.over(topology)


def _by_key(
    config: AssignConfig, features: FeatureFolder, centers: Centers, info: LabelsInfo, topology: Topology
) -> AssignSummary:
    """The first characters of a key name the tar: labels in the order of the features first, then by tar (see `regroup`)."""
    folder, W = Path(config.output_dir), topology.world_size
    collectives.on_main(topology, _claim, folder, info, config)
    store = PieceStore(folder, info, features.fingerprint(), config.tar_of_key)
    finished = collectives.on_main(topology, store.finished)
    sums = _Sums()
    if finished is not None:
        own = list(finished["tars"].items())[topology.rank :: W]
        lacking = sum(not _is_finished(folder, tar, info, rows) for tar, rows in own)
        if not sum(collectives.gather_objects(lacking, topology)):
            sums.already, sums.dropped_before = len(own), finished["dropped"] if topology.is_main else 0
            collectives.on_main(topology, store.remove)
            return sums.over(topology)
    pieces = pieces_of(features)
    todo = []
    for piece in pieces[topology.rank :: W]:
        said = store.said(piece)
        if said is None:
            (store.folder / piece.file_name).unlink(missing_ok=True)  # not to be counted as finished
            todo.append(piece)
        else:
            sums.dropped_before += said["dropped"]
    collectives.barrier(topology)
    index = index_of(centers.array, config.assign, topology.device, config.nprobe) if todo else None
    rows_of = {piece.file_name: piece.stop - piece.start for piece in pieces}
    files = {name: name for name in rows_of}
    batches = _batches(features, [(piece.name, piece.start, piece.stop) for piece in todo], config, topology.device)
    with FolderProgress(
        "labels", topology, store.folder, files, rows_of.__getitem__, features.num_features
    ) as progress:
        for piece in todo:
            keys = features.stored_keys(piece.name, piece.start, piece.stop)
            cosine_nl, label_nl, dropped = _search(batches, piece.stop - piece.start, index, config, progress)
            store.write(piece, keys, label_nl, cosine_nl.astype(np.float16), dropped)
            progress.finish()
            sums.count(cosine_nl, label_nl, dropped)
        collectives.barrier(topology)
    slices, dropped = store.slices(pieces)
    rows = {tar: sum(part.count for part in parts) for tar, parts in slices.items()}
    own = list(slices)[topology.rank :: W]
    for tar in tqdm(own, desc="tars", unit="tar", disable=not topology.is_main):
        if _is_finished(folder, tar, info, rows[tar]):
            sums.already += 1
            continue
        keys, label_nl, cosine_nl = store.read(tar, slices[tar])
        write_label_shard(label_path(folder, tar), keys, label_nl, cosine_nl, info)
    summary = sums.over(topology)
    collectives.on_main(topology, store.finish, rows, dropped)
    return summary


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
        keys = features.keys(name)
        for block in np.array_split(chosen, -(-share // config.batch_size)):
            if config.drop_bad_rows:
                block = block[features.usable_rows(name, 0, len(block), block)[1]]
            unit = features.unit_rows(name, 0, len(block), block).astype(np.float64)
            cosine_nl, label_nl = _exact(unit, centers.array, config.top)
            stored = _stored(config, name, [keys[row] for row in block])
            for kept, cosine_l, label_l in zip(stored, cosine_nl, label_nl, strict=True):
                wanted = set(label_l[cosine_l >= (-2 if config.threshold is None else config.threshold)].tolist())
                found, expected = found + len(wanted & kept), expected + len(wanted)
    return found / max(expected, 1)


def _stored(config: AssignConfig, name: str, keys: list[str]) -> list[set[int]]:
    """The labels that the shards have of these keys of one features file."""
    tars = [name if config.tar_of_key is None else tar_of(key, config.tar_of_key, name) for key in keys]
    places: dict[str, set[int]] = {}
    for tar in sorted(set(tars)):
        path = label_path(config.output_dir, tar)
        shard = read_label_shard(path)
        wanted = {key for key, of in zip(keys, tars, strict=True) if of == tar}
        places |= {key: set(row.tolist()) for key, row in zip(shard.keys, shard.labels, strict=True) if key in wanted}
        lacking = sorted(wanted - set(shard.keys))
        if lacking:
            raise DataError(f"{path} has no labels of key {lacking[0]!r}, which has features in {name}")
    return [places[key] for key in keys]


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


def _claim(folder: Path, info: LabelsInfo, config: AssignConfig) -> None:
    """A label file itself does not say which threshold it was made with; this file does."""
    file = folder / "labels.json"
    now = {"centers_hash": info.centers_hash, "feature_model": info.feature_model}
    now |= {"top": config.top, "threshold": config.threshold}
    now |= {"tar_of_key": config.tar_of_key} if config.tar_of_key else {}
    try:
        before = json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise DataError(f"{file} cannot be read ({error}). Remove it if the labels beside it are yours.") from None
    if before is not None and before != now:
        raise DataError(
            f"{folder} holds labels made with other settings ({before} then, {now} now). Choose another --output_dir, or "
            "remove that folder."
        )
    remove_stale(folder, folder / "pieces")
    if before is None:
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


def _batches(
    features: FeatureFolder, ranges: list[tuple[str, int, int]], config: AssignConfig, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(unit rows float32 [b, d], whether each can be used [b] or None for all) of (features file, start, stop) after each
    other, never of two in one, read ahead where a GPU searches."""

    def read(name: str, low: int, high: int) -> tuple[np.ndarray, np.ndarray | None]:
        if config.drop_bad_rows:
            return features.usable_rows(name, low, high)
        return features.unit_rows(name, low, high), None

    step = config.batch_size
    items = ((name, low, min(low + step, stop)) for name, start, stop in ranges for low in range(start, stop, step))
    return ahead(read, items, device)


def _search(
    batches: Iterator[tuple[np.ndarray, np.ndarray | None]],
    rows: int,
    index: Nearest,
    config: AssignConfig,
    progress: FolderProgress,
) -> tuple[np.ndarray, np.ndarray, int]:
    """(cosines float32 [n, l], labels int32 [n, l], rows dropped) of the next n rows of `batches`, nearest first.

    NO_LABEL with cosine 0 stands for centers below the threshold, and for all of a dropped row.
    """
    cosines = np.zeros((rows, config.top), np.float32)
    labels = np.zeros((rows, config.top), np.int32)
    dropped = low = 0
    while low < rows:
        unit_bd, usable = next(batches)
        own = slice(low, low + len(unit_bd))
        cosines[own], labels[own] = index.search(unit_bd, config.top)
        if usable is not None and not usable.all():
            cosines[own][~usable], labels[own][~usable] = 0, NO_LABEL
            dropped += int((~usable).sum())
        low += len(unit_bd)
        progress.add(len(unit_bd))
    if config.threshold is not None:
        below = cosines < config.threshold
        cosines[below], labels[below] = 0, NO_LABEL
    return cosines, labels, dropped
