"""Labels, centers and tars to what a page about the clusters shows (page.py).

Shapes: n images, k clusters, l labels an image, d dimensions, s sampled images, b of them at a time.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.clustering.assign import load_checked_centers
from mlcd_ds.clustering.label_statistics import COSINE_BINS, LabelStatistics, cosine_histogram, gather_statistics
from mlcd_ds.clustering.page import Classes, ClusterView, ImageView, LabelledImageView, Overlap, Report, render
from mlcd_ds.config import InspectConfig
from mlcd_ds.data.centers import Centers
from mlcd_ds.data.decode import ImageError, decode_image
from mlcd_ds.data.labels import LabelsInfo, check_label_folder, label_path, read_label_shard
from mlcd_ds.data.tars import TarIndex, expand_shards, index_tar, local_shard, read_member, read_samples, shard_name
from mlcd_ds.errors import DataError
from mlcd_ds.evaluation.agreement import Agreement, ImageClasses, agreement
from mlcd_ds.evaluation.features import true_classes
from mlcd_ds.files import make_folder, write_text

JPEG_QUALITY = 82
RANDOM_PAIRS = 100_000
"""Pairs of centers that an image's pairs are held against."""
CENTERS_BYTES = 64_000_000
"""Of centers that are compared at a time."""
FEWEST_IMAGES = 5
"""Clusters of fewer images are not called tight or loose: one image lies near any center made of it."""


@dataclass(frozen=True)
class Folder:
    """The label shards looked at. shards: tars, paths or URLs; names: of tar and label shard; rows: images of each."""

    path: Path
    shards: tuple[str, ...]
    names: tuple[str, ...]
    rows: tuple[int, ...]
    info: LabelsInfo
    described: dict

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: the place of each shard's first image."""
        return np.concatenate([[0], np.cumsum(self.rows, dtype=np.int64)])

    def by_shard(self, places: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """(number of a shard, rows in it) of all `places`, sorted, none twice."""
        starts, places = self.starts, np.unique(np.asarray(places, np.int64))
        shard = np.searchsorted(starts, places, side="right") - 1
        for number in np.unique(shard).tolist():
            yield number, (places[shard == number] - starts[number]).tolist()


@dataclass(frozen=True)
class Sample:
    """Images drawn from all: places int64 [s], labels int32 [s, l], cosines float16 [s, l]."""

    places: np.ndarray
    labels: np.ndarray
    cosines: np.ndarray


def inspect_clusters(config: InspectConfig) -> Report:
    """Writes the page `config.output` and returns what it shows. One process; a pass over the label shards, then a few tars.

    Raises DataError when labels are missing, damaged, of other centers or of other tars, or true classes are asked for and
    not there.
    """
    output = Path(config.output)
    if output.is_dir():
        raise DataError(f"--output {output} is a folder: name the HTML file to write, e.g. {output / 'clusters.html'}")
    make_folder(output.parent)
    centers = load_checked_centers(config.centers)
    folder = open_folder(config, centers)
    names = _class_names(config)
    kept = max(config.nearest_images, config.images_per_label + 1)
    with tqdm(total=sum(folder.rows), desc="labels", unit="image", disable=None) as bar:
        statistics = gather_statistics(folder.path, folder.names, folder.rows, folder.info, kept, bar)
    if not statistics.sizes_k.any():
        raise DataError(
            f"none of the {statistics.num_images} images in {folder.path} has a label: there is nothing to look at. Was "
            "--threshold of tools/assign_labels.py too high?"
        )
    generator = np.random.default_rng(config.seed)
    sample = draw_sample(folder, config.sample_images, generator)
    classes_n, agreed = None, None
    if config.true_classes == "yes" or (config.true_classes == "auto" and _first_has_classes(folder, config)):
        nearest_n, classes_n = read_classes(folder, config)
        agreed = agreement(nearest_n, classes_n)
    report_classes = None if agreed is None else _classes(agreed, nearest_n, classes_n, sample, names, generator)
    groups = choose_clusters(statistics, config, generator)
    chosen = [sample.places[i] for i in _with_labels(sample, config.images, generator)]
    clusters = {
        title: [_cluster_view(c, statistics, agreed, names, config.nearest_images) for c in group]
        for title, group in groups.items()
    }
    rows = [
        _labelled_image(sample, place, statistics, agreed, names, config.images_per_label) for place in map(int, chosen)
    ]
    places = [place for views in clusters.values() for view in views for place, _ in view.nearest]
    places += [place for row in rows for label in row.labels for place, _ in label.nearest] + [r.place for r in rows]
    report = Report(
        config=config,
        info=folder.info,
        described=folder.described,
        num_shards=len(folder.names),
        statistics=statistics,
        overlap=compare_labels(sample, centers.array, config.near_cosine, generator),
        classes=report_classes,
        clusters=clusters,
        labelled_images=rows,
        images=read_images(folder, places, classes_n, names, config),
        fewest_images=FEWEST_IMAGES,
    )
    write_text(output, render(report))
    return report


# ---------------------------------------------------------------------------------------------- what is there


def open_folder(config: InspectConfig, centers: Centers) -> Folder:
    """The labels of `config.shards`; raises DataError unless they, labels.json and the centers belong together."""
    shards = tuple(expand_shards(config.shards, config.allow_pipe))
    names = tuple(shard_name(shard) for shard in shards)
    info, rows = check_label_folder(config.labels, names, 1)
    path = Path(config.labels)
    described = _read_described(path / "labels.json")
    for where, found in ((path / "labels.json", described.get("centers_hash")), (path, info.centers_hash)):
        if found is not None and found != centers.hash:
            raise DataError(
                f"{where}: labels of the centers {str(found)[:12]}..., but --centers {config.centers} are "
                f"{centers.hash[:12]}... (SHA-256 of centers.npy). Give the centers the labels were made with, or assign "
                "labels again with tools/assign_labels.py."
            )
    if len(centers.array) != info.num_classes:
        raise DataError(
            f"{path} holds labels of {info.num_classes} centers, --centers {config.centers} has {len(centers.array)}: "
            "assign labels again with tools/assign_labels.py"
        )
    return Folder(path, shards, names, rows, info, described)


def _read_described(file: Path) -> dict:
    """labels.json; {} where a folder from elsewhere has none."""
    if not file.exists():
        return {}
    try:
        described = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read ({error}). Assign labels again with tools/assign_labels.py.") from None
    if not isinstance(described, dict):
        raise DataError(f"{file} holds no settings of labels. Assign labels again with tools/assign_labels.py.")
    return described


def _class_names(config: InspectConfig) -> list[str]:
    if config.class_names is None:
        return []
    try:
        return Path(config.class_names).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--class_names {config.class_names} cannot be read: {error}") from None


def _named(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"


# ---------------------------------------------------------------------------------------------- choosing


def draw_sample(folder: Folder, size: int, generator: np.random.Generator) -> Sample:
    """`size` images (or all) drawn uniformly, in order; reads the shards that have some of them."""
    counts = np.asarray(folder.rows)
    shares = generator.multivariate_hypergeometric(counts, min(size, int(counts.sum())), method="marginals")
    starts, parts = folder.starts, []
    for number in tqdm(np.flatnonzero(shares).tolist(), desc="sample", unit="shard", disable=None):
        rows = np.sort(generator.choice(counts[number], shares[number], replace=False, shuffle=False))
        shard = read_label_shard(label_path(folder.path, folder.names[number]))
        parts.append((starts[number] + rows, shard.labels[rows], shard.cosines[rows]))
    return Sample(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _with_labels(sample: Sample, count: int, generator: np.random.Generator) -> np.ndarray:
    there = np.flatnonzero(sample.labels[:, 0] != NO_LABEL)
    return np.sort(generator.choice(there, min(count, len(there)), replace=False))


def choose_clusters(
    statistics: LabelStatistics, config: InspectConfig, generator: np.random.Generator
) -> dict[str, list[int]]:
    """Clusters to show, by the title they stand under."""
    sizes_k, filled = statistics.sizes_k, np.flatnonzero(statistics.sizes_k)
    drawn = generator.choice(filled, min(config.random_clusters, len(filled)), replace=False)
    largest = np.argsort(-sizes_k, kind="stable")[: config.largest_clusters]
    enough = np.flatnonzero(sizes_k >= FEWEST_IMAGES)
    by_cosine = enough[np.argsort(-statistics.mean_cosine_k[enough], kind="stable")]
    groups = {
        "Random clusters": np.sort(drawn),
        "Largest clusters": largest[sizes_k[largest] > 0],
        "Tightest clusters": by_cosine[: config.tightest_clusters],
        "Loosest clusters": by_cosine[::-1][: config.loosest_clusters],
    }
    return {title: group.tolist() for title, group in groups.items() if len(group)}


def _majority(cluster: int, agreed: Agreement | None, names: Sequence[str]) -> tuple[str, float] | None:
    if agreed is None:
        return None
    at = int(np.searchsorted(agreed.clusters, cluster))
    if at == len(agreed.clusters) or agreed.clusters[at] != cluster:
        return None
    return _named(int(agreed.majority[at]), names), float(agreed.majority_share[at])


def _cluster_view(
    cluster: int,
    statistics: LabelStatistics,
    agreed: Agreement | None,
    names: Sequence[str],
    count: int,
    without: int | None = None,
    cosine: float | None = None,
) -> ClusterView:
    return ClusterView(
        number=cluster,
        size=int(statistics.sizes_k[cluster]),
        mentions=int(statistics.mentions_k[cluster]),
        mean_cosine=float(statistics.mean_cosine_k[cluster]),
        majority=_majority(cluster, agreed, names),
        nearest=statistics.nearest.of(cluster, count, without),
        cosine=cosine,
    )


def _labelled_image(
    sample: Sample, place: int, statistics: LabelStatistics, agreed: Agreement | None, names: Sequence[str], count: int
) -> LabelledImageView:
    at = int(np.searchsorted(sample.places, place))
    pairs = zip(sample.labels[at].tolist(), sample.cosines[at].tolist(), strict=True)
    return LabelledImageView(
        place,
        [
            _cluster_view(label, statistics, agreed, names, count, place, cosine)
            for label, cosine in pairs
            if label != NO_LABEL
        ],
    )


# ---------------------------------------------------------------------------------------------- labels of one image


def compare_labels(sample: Sample, centers_kd: np.ndarray, near: float, generator: np.random.Generator) -> Overlap:
    """Cosines between the centers of an image's labels, over the sample, and between centers drawn at random."""
    k, l = len(centers_kd), sample.labels.shape[1]
    upper = np.triu_indices(l, 1)
    at_a_time = max(1, CENTERS_BYTES // (4 * l * centers_kd.shape[1]))
    counts, near_images, compared, total, pairs = np.zeros(COSINE_BINS, np.int64), 0, 0, 0.0, 0
    for start in range(0, len(sample.labels), at_a_time):
        labels_bl = sample.labels[start : start + at_a_time]
        units = _units(centers_kd, np.where(labels_bl == NO_LABEL, 0, labels_bl))
        cosine = np.einsum("bid,bjd->bij", units, units)[:, upper[0], upper[1]]
        there = (labels_bl != NO_LABEL)[:, upper[0]] & (labels_bl != NO_LABEL)[:, upper[1]]
        counts += cosine_histogram(cosine[there])
        near_images += int(((cosine > near) & there).any(1).sum())
        compared += int(there.any(1).sum())
        total, pairs = total + float(cosine[there].sum(dtype=np.float64)), pairs + int(there.sum())
    drawn = np.zeros(COSINE_BINS, np.int64)
    if k > 1:
        first = generator.integers(0, k, RANDOM_PAIRS)
        second = (first + generator.integers(1, k, RANDOM_PAIRS)) % k
        for start in range(0, RANDOM_PAIRS, at_a_time):
            part = slice(start, start + at_a_time)
            drawn += cosine_histogram((_units(centers_kd, first[part]) * _units(centers_kd, second[part])).sum(-1))
    return Overlap(
        images=compared,
        pair_histogram=counts,
        random_histogram=drawn,
        mean_cosine=total / max(1, pairs),
        near_share=near_images / max(1, compared),
    )


def _units(centers_kd: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Rows of length 1: bare centers from elsewhere may have others."""
    rows = np.asarray(centers_kd[numbers], np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


# ---------------------------------------------------------------------------------------------- true classes


def _first_has_classes(folder: Folder, config: InspectConfig) -> bool:
    number = next(i for i, rows in enumerate(folder.rows) if rows)
    index = index_tar(local_shard(folder.shards[number], config.shard_cache, config.allow_pipe))
    key = read_label_shard(label_path(folder.path, folder.names[number])).keys[0]
    members = index.members[_known(key, index, folder, number)]
    if "cls" in members:
        return True
    if "json" not in members:
        return False
    try:
        record = json.loads(read_member(index.path, *members["json"]))
    except ValueError as error:
        raise DataError(
            f"{index.path}: {key}.json cannot be read ({error}): mend it, or look at the clusters with --true_classes no"
        ) from None
    return isinstance(record, dict) and config.classes_key in record


def read_classes(folder: Folder, config: InspectConfig) -> tuple[np.ndarray, ImageClasses]:
    """(nearest label int32 [n], true classes) of all images, in the order of the label shards. 12 bytes an image, 8 a class.

    Raises DataError for a labelled image that its tar does not have, and where its classes are missing.
    """
    nearest, classes = [], []
    with tqdm(total=sum(folder.rows), desc="true classes", unit="image", disable=None) as bar:
        for number, name in enumerate(folder.names):
            shard = read_label_shard(label_path(folder.path, name))
            path = local_shard(folder.shards[number], config.shard_cache, config.allow_pipe)
            row_of = {key: row for row, key in enumerate(shard.keys)}
            found: list = [None] * len(row_of)
            for key, parts in read_samples(path, ("json", "cls")):
                if key in row_of:
                    found[row_of[key]] = true_classes(path, key, parts, config.classes_key)
            if None in found:
                raise DataError(_other_tars(shard.keys[found.index(None)], path, folder, number))
            nearest.append(shard.labels[:, 0])
            classes.append(ImageClasses.of(found))
            bar.update(len(found))
    return np.concatenate(nearest), ImageClasses.joined(classes)


def _classes(
    agreed: Agreement,
    nearest_n: np.ndarray,
    classes: ImageClasses,
    sample: Sample,
    names: Sequence[str],
    generator: np.random.Generator,
) -> Classes:
    shuffled = agreement(generator.permutation(nearest_n), classes)
    majority = np.full(int(agreed.clusters.max(initial=0)) + 1, -1, np.int64)
    majority[agreed.clusters] = agreed.majority
    own = [_classes_of(classes, place) for place in sample.places.tolist()]
    strangers = [own[i] for i in generator.permutation(len(own))]

    def share(column: int, sets: list[set[int]]) -> float:
        label = sample.labels[:, column]
        known = (label != NO_LABEL) & (label < len(majority))
        known[known] = majority[label[known]] >= 0
        rows = np.flatnonzero(known).tolist()
        return sum(int(majority[label[i]]) in sets[i] for i in rows) / max(1, len(rows))

    columns = range(sample.labels.shape[1])
    numbers, counts = np.unique(classes.values, return_counts=True)
    top = int(counts.argmax()) if len(counts) else None
    return Classes(
        agreement=agreed,
        shuffled=shuffled,
        classes_per_image=len(classes.values) / max(1, len(classes)),
        commonest=None if top is None else (_named(int(numbers[top]), names), float(counts[top] / len(classes))),
        sampled=len(own),
        share_by_label=[share(column, own) for column in columns],
        share_by_chance=[share(column, strangers) for column in columns],
    )


def _classes_of(classes: ImageClasses, place: int) -> set[int]:
    return set(classes.values[classes.offsets[place] : classes.offsets[place + 1]].tolist())


# ---------------------------------------------------------------------------------------------- pictures


def read_images(
    folder: Folder, places: Sequence[int], classes: ImageClasses | None, names: Sequence[str], config: InspectConfig
) -> dict[int, ImageView]:
    """The images at `places`, as thumbnails. One that cannot be decoded has its reason instead.

    Raises DataError for an image that its tar does not have.
    """
    starts, views = folder.starts, {}
    with tqdm(total=len(set(places)), desc="thumbnails", unit="image", disable=None) as bar:
        for number, rows in folder.by_shard(places):
            index = index_tar(local_shard(folder.shards[number], config.shard_cache, config.allow_pipe))
            keys = read_label_shard(label_path(folder.path, folder.names[number])).keys
            for row in rows:
                place = int(starts[number]) + row
                data = read_member(index.path, *index.image(_known(keys[row], index, folder, number)))
                source, problem = _thumbnail(data, config)
                known = [] if classes is None else sorted(_classes_of(classes, place))
                views[place] = ImageView(folder.names[number], keys[row], source, problem, _caption(known, names))
                bar.update(1)
    return views


def _caption(classes: list[int], names: Sequence[str]) -> str:
    """'cat, dog'; 'classes 3, 5' where not all have names; '' for none."""
    if all(number < len(names) for number in classes):
        return ", ".join(names[number] for number in classes)
    return ("class " if len(classes) == 1 else "classes ") + ", ".join(map(str, classes))


def _thumbnail(data: bytes, config: InspectConfig) -> tuple[str, str]:
    """(data: URI of a JPEG, "") or ("", why there is none)."""
    try:
        pixels = decode_image(data, config.max_pixels, config.thumbnail_pixels)
    except ImageError as error:
        return "", error.reason
    image = Image.fromarray(pixels)
    image.thumbnail((config.thumbnail_pixels, config.thumbnail_pixels), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode(), ""


def _known(key: str, index: TarIndex, folder: Folder, number: int) -> str:
    if key not in index.members:
        raise DataError(_other_tars(key, index.path, folder, number))
    return key


def _other_tars(key: str, path: Path, folder: Folder, number: int) -> str:
    return (
        f"{path} has no image {key!r}, which {label_path(folder.path, folder.names[number])} has labels for: these are "
        "labels of other tars, or the tar was written anew since. Give the --shards that features were extracted from, or "
        "extract features and assign labels again."
    )
