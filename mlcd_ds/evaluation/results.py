"""Result files in CLIP_benchmark's shape: its `build` step reads ours, and tools/report.py reads both.

    {"dataset", "model", "pretrained", "task", "metrics": {name: number}, "language", "details": {...}}

one JSON file per model, dataset and task, named {dataset}_{pretrained}_{model}_{language}_{task}.json. model: the
architecture (vit_b32). pretrained: where its weights are from (run:runs/a, hf:FOLDER). Metric names are CLIP_benchmark's
where it has one: acc1, acc5, mean_per_class_recall, mean_average_precision, image_retrieval_recall@5,
text_retrieval_recall@5; lp_acc1, lp_acc5, lp_mean_per_class_recall of a linear probe. Numbers are shares from 0 to 1; null
where there is none. `details` is ours: protocol, settings, counts.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlcd_ds.errors import DataError
from mlcd_ds.evaluation.datasets import METRICS, identify
from mlcd_ds.files import make_folder, write_json

TASKS = ("linear_probe", "knn", "zeroshot_classification", "zeroshot_retrieval", "finetune")
"""The first, third and fourth are CLIP_benchmark's names."""
NAMES = ("dataset", "model", "pretrained", "task", "language")
MAX_NAME = 200
"""Characters of a file's name without .json: file systems take 255 bytes, with what is written beside it for a while."""
MAIN_METRIC = "main_metric"
"""Name in `details` of the metric that the dataset is reported by."""


@dataclass(frozen=True)
class Result:
    """What one model scored on one dataset in one task.

    metrics: shares from 0 to 1, None where a metric has no meaning. details: anything that JSON can hold; `main_metric`
    in it names the metric that tables show.
    """

    dataset: str
    model: str
    pretrained: str
    task: str
    metrics: dict[str, float | None]
    language: str = "en"
    details: dict = field(default_factory=dict)

    @property
    def main_metric(self) -> str:
        """Name of the metric that tables show: what `details` says, else that of CLIP's table for a linear probe of one of
        its 27 sets, else the first."""
        stated, usual = self.details.get(MAIN_METRIC), usual_metric(self.task, self.dataset)
        return stated or (usual if usual in self.metrics else next(iter(self.metrics)))

    @property
    def score(self) -> float | None:
        """The main metric's value; None where it has none (NaN, as of a class without an image)."""
        value = self.metrics.get(self.main_metric)
        return None if value is None or math.isnan(value) else value

    @property
    def full_name(self) -> str:
        """Model and weights, as CLIP_benchmark's `model_fullname`."""
        return f"{self.model} {self.pretrained}"


def usual_metric(task: str, dataset: str) -> str | None:
    """Name of the metric that linear probes of CLIP's 27 sets are reported by; None of other tasks and sets."""
    metric = identify(dataset).metric
    return f"lp_{METRICS[metric]}" if metric and task == "linear_probe" else None


def file_name(result: Result) -> str:
    """CLIP_benchmark's name of a result's file; what is no letter, digit, dot, dash or underscore becomes a '-'.

    One too long for a file system, as of several whole paths, is cut, with a hash at its end.
    """
    parts = (result.dataset, result.pretrained, result.model, result.language, result.task)
    name = "_".join(re.sub(r"[^A-Za-z0-9._\-]+", "-", part).strip("-") or "none" for part in parts)
    return (name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]}_{_hash(result)}") + ".json"


def write_result(path: str | Path, result: Result) -> Path:
    """Writes `result` to the file `path`, or under its own name into a folder (a path that does not end in .json).

    Returns the file. One of the same name in the folder is replaced when it is of the same dataset, model, weights, task
    and language; else ours gets a hash behind its name. NaN becomes null: JSON has no other word for it. Raises DataError
    where it cannot be written, and ValueError for a metric that is no finite number otherwise, or a task that is not in
    TASKS: faults of the caller.
    """
    if result.task not in TASKS:
        raise ValueError(f"task {result.task!r} is none of {TASKS}")
    if not result.metrics:
        raise ValueError("a result without a metric")
    path = Path(path)
    file = path if path.suffix == ".json" else _free_file(path / file_name(result), result)
    make_folder(file.parent)
    document = asdict(result)
    document["metrics"] = {name: _plain(name, value) for name, value in result.metrics.items()}
    try:
        write_json(file, document)
    except OSError as error:
        raise DataError(f"the result {file} cannot be written: {error}") from None
    return file


def _identity(result: Result) -> tuple[str, ...]:
    return tuple(getattr(result, name) for name in NAMES)


def _free_file(file: Path, result: Result) -> Path:
    if not file.exists() or _identity(read_result(file)) == _identity(result):
        return file
    return file.with_name(f"{file.stem}_{_hash(result)}.json")


def _hash(result: Result) -> str:
    return hashlib.sha256(repr(_identity(result)).encode()).hexdigest()[:8]


def _plain(name: str, value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    if not math.isfinite(value):
        raise ValueError(f"metric {name} is {value}")
    return float(value)


def read_result(path: str | Path) -> Result:
    """The result in a file, ours or CLIP_benchmark's. Raises DataError where the file is none."""
    expected = (
        f"expected a JSON object with the texts {', '.join(NAMES[:4])} and an object 'metrics' of numbers, as "
        "tools/linear_probe.py and clip_benchmark write"
    )
    try:
        # CLIP_benchmark writes NaN for what it cannot measure (acc5 of four classes).
        document = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): {expected}") from None
    problem = _problem(document)
    if problem:
        raise DataError(f"{path} is no result ({problem}): {expected}")
    texts = {name: document[name] for name in NAMES if name in document}
    metrics = {name: None if value is None else float(value) for name, value in document["metrics"].items()}
    return Result(**texts, metrics=metrics, details=document.get("details") or {})


def _problem(document: object) -> str | None:
    if not isinstance(document, Mapping):
        return "no object"
    for name in NAMES:
        if not isinstance(document.get(name, "en" if name == "language" else None), str):
            return f"{name!r} is {document.get(name)!r}"
    metrics = document.get("metrics")
    if not isinstance(metrics, Mapping) or not metrics:
        return f"'metrics' is {str(metrics)[:40]!r}"
    wrong = [name for name, value in metrics.items() if not (value is None or type(value) in (int, float))]
    return f"metric {wrong[0]!r} is {metrics[wrong[0]]!r}" if wrong else None


def find_result(place: str | Path, blank: Result, inputs: Iterable[Path]) -> Result | None:
    """The result in `place` (see `write_result`) that need not be made again; None where there is none.

    It must be of the dataset, model, weights, task and language of `blank`, have all of its details as they are there, and
    be newer than every file of `inputs`.
    """
    file = Path(place) if Path(place).suffix == ".json" else Path(place) / file_name(blank)
    files = (file, file.with_name(f"{file.stem}_{_hash(blank)}.json"))
    for file in filter(Path.is_file, files):
        try:
            result = read_result(file)
        except DataError:
            continue  # it is replaced
        same = _identity(result) == _identity(blank) and result.score is not None
        details = json.loads(json.dumps(blank.details))
        made_alike = all(result.details.get(name) == value for name, value in details.items())
        if same and made_alike and all(path.stat().st_mtime <= file.stat().st_mtime for path in inputs):
            return result
    return None


def read_results(folder: str | Path) -> dict[Path, Result]:
    """Every *.json in `folder` (not below it), by file, sorted by name. Raises DataError for none, or for one that is no
    result."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise DataError(
            f"{folder} holds no result: expected *.json files as tools/linear_probe.py writes with --output_dir"
        )
    return {file: read_result(file) for file in files}
