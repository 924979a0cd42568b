"""The evaluation sets: CLIP's 27 by name, with the metric each is reported by, and where their tars lie below one root.

A set is a folder in CLIP_benchmark's layout: train/, test/ and, where there is one, val/ with 0.tar, 1.tar ... and
nshards.txt; classnames.txt; dataset_type.txt ("multilabel" or "retrieval"; nothing for one class an image). Any such
folder can be named, of the 27 or not.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlcd_ds.data.tars import expand_shards
from mlcd_ds.errors import ConfigError, DataError

METRICS = {
    "accuracy": "acc1",
    "mean_per_class": "mean_per_class_recall",
    "mean_average_precision": "mean_average_precision",
    "11_point_mean_average_precision": "11_point_mean_average_precision",
    "top1_top5": "mean_of_acc1_and_acc5",
    "roc_auc": "roc_auc",
}
"""Ways to report a set, and their names in result files (linear probes put lp_ in front)."""
ONE_VS_REST = ("mean_average_precision", "11_point_mean_average_precision")
VALIDATION_FOLDERS = ("val", "validation", "valid")


@dataclass(frozen=True)
class KnownSet:
    """A set by its name. metric: of METRICS, None where classes say it. num_classes: CLIP's count, None of a set not in
    its table. slug: CLIP_benchmark's name, None where it has none."""

    name: str
    metric: str | None
    num_classes: int | None
    slug: str | None

    def folders(self) -> list[str]:
        """Names that its folder may have below the root."""
        if self.slug is None:
            return [self.name]
        clean = self.slug.replace("/", "-")
        return list(dict.fromkeys([self.name, clean, f"wds_{clean}", self.slug, f"wds/{self.slug}"]))

    @property
    def result_name(self) -> str:
        """What result files call it: as CLIP_benchmark does where it knows the set."""
        return f"wds/{self.slug}" if self.slug else self.name


def _table() -> dict[str, KnownSet]:
    rows = (  # Radford et al. 2021 (arXiv 2103.00020), table 9: name, metric, classes; slugs: clip_benchmark 1.6.2
        ("food101", "accuracy", 101, None),
        ("cifar10", "accuracy", 10, "vtab/cifar10"),
        ("cifar100", "accuracy", 100, "vtab/cifar100"),
        ("birdsnap", "accuracy", 500, None),
        ("sun397", "accuracy", 397, "sun397"),
        ("cars", "accuracy", 196, "cars"),
        ("fgvc_aircraft", "mean_per_class", 100, "fgvc_aircraft"),
        ("voc2007", "11_point_mean_average_precision", 20, "voc2007_multilabel"),
        ("dtd", "accuracy", 47, "vtab/dtd"),
        ("pets", "mean_per_class", 37, "vtab/pets"),
        ("caltech101", "mean_per_class", 102, "vtab/caltech101"),
        ("flowers", "mean_per_class", 102, "vtab/flowers"),
        ("mnist", "accuracy", 10, "mnist"),
        ("fer2013", "accuracy", 8, "fer2013"),
        ("stl10", "accuracy", 10, "stl10"),
        ("eurosat", "accuracy", 10, "vtab/eurosat"),
        ("resisc45", "accuracy", 45, "vtab/resisc45"),
        ("gtsrb", "accuracy", 43, "gtsrb"),
        ("kitti", "accuracy", 4, "vtab/kitti_closest_vehicle_distance"),
        ("country211", "accuracy", 211, "country211"),
        ("pcam", "accuracy", 2, "vtab/pcam"),
        ("ucf101", "accuracy", 101, None),
        ("kinetics700", "top1_top5", 700, None),
        ("clevr_count_all", "accuracy", 8, "vtab/clevr_count_all"),
        ("hateful_memes", "roc_auc", 2, None),
        ("renderedsst2", "accuracy", 2, "renderedsst2"),
        ("imagenet1k", "accuracy", 1000, "imagenet1k"),
    )
    return {row[0]: KnownSet(*row) for row in rows}


KNOWN_SETS = _table()
"""CLIP's 27 sets for linear probes, in its order. The MLCD paper reports imagenet1k by itself and the mean of the others."""


_OTHERS = (  # clip_benchmark 1.6.2, benchmark/webdatasets.txt: its sets that are not among the 27
    "mscoco_captions flickr8k flickr30k imagenetv2 imagenet_sketch imagenet-a imagenet-r imagenet-o objectnet voc2007 "
    "vtab/clevr_closest_object_distance vtab/diabetic_retinopathy vtab/dmlab vtab/dsprites_label_orientation "
    "vtab/dsprites_label_x_position vtab/dsprites_label_y_position vtab/smallnorb_label_azimuth "
    "vtab/smallnorb_label_elevation vtab/svhn"
).split()
OTHER_SETS = {slug: KnownSet(slug.removeprefix("vtab/"), None, None, slug) for slug in _OTHERS}
"""The other sets of CLIP_benchmark, by slug: for retrieval, of robustness, of VTAB. Its voc2007 has crops of one class; the
27's is its voc2007_multilabel."""


def _by_slug() -> dict[str, KnownSet]:
    sets = [*KNOWN_SETS.values(), *OTHER_SETS.values()]
    slugs = {known.slug.replace("/", "-"): known for known in sets if known.slug}
    return {known.name: known for known in sets} | slugs


_BY_SLUG = _by_slug()


def identify(name: str) -> KnownSet:
    """The set that a name means: one of the 27's, a slug of CLIP_benchmark's (with or without wds/), or the name of a folder
    as it downloads them (wds_vtab-pets). Any other name means a set of the user's own.
    """
    if name in KNOWN_SETS:
        return KNOWN_SETS[name]
    plain = name.removeprefix("wds/").removeprefix("wds_").replace("/", "-")
    return _BY_SLUG.get(plain) or KnownSet(name, None, None, None)


def locate(root: str, names: Sequence[str], splits: Sequence[str]) -> tuple[list[tuple[KnownSet, Path]], list[str]]:
    """([(set, its folder below `root`)] in the order of `names`, those known sets that are not there).

    splits: subfolders that a set must have. Raises ConfigError for no name, one that comes twice or is neither known nor a
    folder; DataError for a set that lies there more than once, or whose folder is another set's.
    """
    sets = [identify(name) for name in names]
    if not sets or len({known.name for known in sets}) < len(sets):
        raise ConfigError(f"--datasets {','.join(names)!r}: expected all, or different names joined by commas")
    found, missing = [], []
    for asked, known in zip(names, sets, strict=True):
        places = [place for place in known.folders() if all((Path(root) / place / split).is_dir() for split in splits)]
        if len(places) > 1:
            raise DataError(
                f"{known.name} lies below {root} more than once ({', '.join(places)}): move all but one out of it"
            )
        if places:
            found.append((known, Path(root) / places[0]))
            _check_kind(known, found[-1][1])
        elif known.num_classes or known.slug:
            missing.append(known.name)
        else:
            near = difflib.get_close_matches(asked, [*KNOWN_SETS, *OTHER_SETS], n=1)
            raise ConfigError(
                f"--datasets: {asked!r} is none of the {len(KNOWN_SETS)} known sets, nor a slug of CLIP_benchmark, and "
                f"{Path(root) / asked} holds no {'/ and '.join(splits)}/. {f'Did you mean {near[0]}? ' if near else ''}"
                f"Known: {', '.join(KNOWN_SETS)}"
            )
    return found, missing


def _check_kind(known: KnownSet, folder: Path) -> None:
    """Refuses CLIP_benchmark's voc2007 for its voc2007_multilabel, whose short name that is."""
    if known.metric in ONE_VS_REST and dataset_type(folder) != "multilabel":
        raise DataError(
            f"{folder} is no set of several classes an image (its dataset_type.txt does not say multilabel): {known.name} "
            f"of the {len(KNOWN_SETS)} is CLIP_benchmark's {known.slug}. If it is CLIP_benchmark's {known.name}, crops of "
            f"one class each, name the folder wds_{known.name}, and wds_{known.name} in --datasets"
        )


def check_root(root: str) -> Path:
    """`root` as a path. Raises DataError where it is no folder."""
    if not Path(root).is_dir():
        raise DataError(f"--root {root} is no folder: expected one that holds a folder per evaluation set")
    return Path(root)


def split_names(names: str) -> list[str]:
    """The names in --datasets."""
    return [name.strip() for name in names.split(",") if name.strip()]


@dataclass(frozen=True)
class EvaluationSet:
    """A set that is there. folder: None where its tars were named one by one. known: see `identify`, None where tars were.

    shards: {"train": [...], "test": [...]} and, where there is one, "val". metric: of METRICS, or None for what its classes
    suggest: accuracy where every image has one, else mean average precision.
    """

    name: str
    shards: dict[str, list[str]]
    metric: str | None
    folder: Path | None = None
    known: KnownSet | None = None

    @property
    def result_name(self) -> str:
        """What result files call it."""
        return self.name if self.known is None else self.known.result_name


def find_sets(root: str, names: str) -> tuple[list[EvaluationSet], list[str]]:
    """(the sets of `names` that lie below `root`, names of those that do not).

    names: "all" (the 27), or names joined by commas, see `identify`. Raises ConfigError and DataError as `locate`, DataError
    for a set that is there and incomplete.
    """
    check_root(root)
    found, missing = locate(root, list(KNOWN_SETS) if names == "all" else split_names(names), ("test", "train"))
    return [_open(known, folder) for known, folder in found], missing


def _open(known: KnownSet, folder: Path) -> EvaluationSet:
    validation = [split for split in VALIDATION_FOLDERS if (folder / split).is_dir()]
    shards = {"train": shards_of_split(folder, "train"), "test": shards_of_split(folder, "test")}
    if validation:
        shards["val"] = shards_of_split(folder, validation[0])
    kind = dataset_type(folder)
    if kind == "retrieval":
        raise DataError(f"{folder} is a set for retrieval (dataset_type.txt): its images have captions, no classes")
    metric = known.metric or ("mean_average_precision" if kind == "multilabel" else None)
    return EvaluationSet(known.name, shards, metric, folder, known)


def dataset_type(folder: Path) -> str:
    """dataset_type.txt of a set: "multilabel", "retrieval" or, where it says nothing, "classification"."""
    file = folder / "dataset_type.txt"
    found = file.read_text(encoding="utf-8").strip().lower() if file.is_file() else "classification"
    if found not in ("multilabel", "retrieval", "classification"):
        raise DataError(f"{file} says {found!r}: expected multilabel, retrieval or classification")
    return found


def shards_of_split(folder: Path, split: str) -> list[str]:
    """The tars 0.tar .. of one split, as many as nshards.txt says; without that file every *.tar, sorted by name.

    Raises DataError for a split without tars, a nshards.txt that is no number, or a tar that is missing.
    """
    place, counted = folder / split, folder / split / "nshards.txt"
    if not counted.is_file():
        return expand_shards(str(place / "*.tar"))
    text = counted.read_text(encoding="utf-8").strip()
    if not text.isdigit() or int(text) == 0:
        raise DataError(f"{counted} says {text[:40]!r}: expected the number of tars in {place}")
    files = [place / f"{number}.tar" for number in range(int(text))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{place} lacks {len(missing)} of the {text} tars that its nshards.txt counts, e.g. {missing[0]}: fetch them"
        )
    return [str(file) for file in files]
