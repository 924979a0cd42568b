"""The evaluation sets: CLIP's 27 by name, with the metric each is reported by, and where their tars lie below one root.

A set is a folder in CLIP_benchmark's layout: train/, test/ and, where there is one, val/ with 0.tar, 1.tar ... and
nshards.txt; classnames.txt; dataset_type.txt ("multilabel" or "retrieval"; nothing for one class an image). Any such
folder can be named, of the 27 or not.
"""

import difflib
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
    """A set of the table. metric: of METRICS. num_classes: CLIP's count. slug: CLIP_benchmark's name, None where it has
    none."""

    name: str
    metric: str
    num_classes: int
    slug: str | None

    def folders(self) -> list[str]:
        """Names that its folder may have below the root."""
        if self.slug is None:
            return [self.name]
        clean = self.slug.replace("/", "-")
        return list(dict.fromkeys([self.name, clean, f"wds_{clean}", self.slug, f"wds/{self.slug}"]))


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


@dataclass(frozen=True)
class EvaluationSet:
    """A set that is there. folder: None where its tars were named one by one. known: its row of the table, if it has one.

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
        """What result files call it: as CLIP_benchmark does where it knows the set."""
        return f"wds/{self.known.slug}" if self.known is not None and self.known.slug else self.name


def find_sets(root: str, names: str) -> tuple[list[EvaluationSet], list[str]]:
    """(the sets of `names` that lie below `root`, names of those that do not).

    names: "all" (the 27), or names joined by commas, of the table or of folders below the root. Raises ConfigError for a
    name that is neither, DataError for a set that is there and incomplete.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"--root {root} is no folder: expected one that holds a folder per evaluation set")
    wanted = list(KNOWN_SETS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or len(set(wanted)) < len(wanted):
        raise ConfigError(f"--datasets {names!r}: expected all, or different names joined by commas")
    found, missing = [], []
    for name in wanted:
        known = KNOWN_SETS.get(name)
        places = [place for place in (known.folders() if known else [name]) if _is_a_set(folder / place)]
        if len(places) > 1:
            raise DataError(
                f"{name} lies below {root} more than once ({', '.join(places)}): move all but one out of it"
            )
        if places:
            found.append(_open(name, folder / places[0], known))
        elif known is not None:
            missing.append(name)
        else:
            near = difflib.get_close_matches(name, KNOWN_SETS, n=1)
            raise ConfigError(
                f"--datasets: {name!r} is none of the {len(KNOWN_SETS)} known sets, and {folder / name} holds no test/ and "
                f"train/. {f'Did you mean {near[0]}? ' if near else ''}Known: {', '.join(KNOWN_SETS)}"
            )
    return found, missing


def _is_a_set(folder: Path) -> bool:
    return (folder / "test").is_dir() and (folder / "train").is_dir()


def _open(name: str, folder: Path, known: KnownSet | None) -> EvaluationSet:
    validation = [split for split in VALIDATION_FOLDERS if (folder / split).is_dir()]
    shards = {"train": shards_of_split(folder, "train"), "test": shards_of_split(folder, "test")}
    if validation:
        shards["val"] = shards_of_split(folder, validation[0])
    kind = dataset_type(folder)
    if kind == "retrieval":
        raise DataError(f"{folder} is a set for retrieval (dataset_type.txt): its images have captions, no classes")
    metric = known.metric if known else "mean_average_precision" if kind == "multilabel" else None
    return EvaluationSet(name, shards, metric, folder, known)


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
