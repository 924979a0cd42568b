"""Result files: CLIP_benchmark's shape, and what is refused."""

import csv
import json
import math

import pytest

from mlcd_ds.errors import DataError
from mlcd_ds.evaluation.results import Result, file_name, read_result, read_results, write_result


def a_result(**changed) -> Result:
    fields = {
        "dataset": "wds/vtab/cifar10",
        "model": "vit_b32",
        "pretrained": "run:runs/a",
        "task": "linear_probe",
        "metrics": {"lp_acc1": 0.75, "lp_acc5": math.nan},
        "details": {"main_metric": "lp_acc1", "n_test": 5},
    }
    return Result(**fields | changed)


def clip_benchmarks_build(files, output):
    """What `clip_benchmark build` 1.6.2 does with a list of files."""
    rows, fieldnames = [], set()
    for path in files:
        data = json.loads(path.read_text())
        row = {}
        row.update(data["metrics"])
        row.update(data)
        del row["metrics"]
        row["model_fullname"] = row["model"] + " " + row["pretrained"]
        fieldnames |= set(row)
        rows.append(row)
    with output.open("w") as file:
        writer = csv.DictWriter(file, fieldnames=sorted(fieldnames))
        writer.writeheader()
        writer.writerows(rows)


def test_written_read_and_built(tmp_path):
    file = write_result(tmp_path / "results", a_result())
    assert file.name == "wds-vtab-cifar10_run-runs-a_vit_b32_en_linear_probe.json" == file_name(a_result())
    found = read_result(file)
    assert (found.metrics, found.score, found.details["n_test"]) == ({"lp_acc1": 0.75, "lp_acc5": None}, 0.75, 5)
    other = a_result(task="knn", metrics={"knn20_acc1": 0.5}, details={})
    write_result(tmp_path / "results", other)
    assert read_results(tmp_path / "results")[tmp_path / "results" / file_name(other)] == other
    assert write_result(tmp_path / "results", a_result()) == file  # replaced
    twin = write_result(tmp_path / "twins", a_result())
    assert write_result(tmp_path / "twins", a_result(pretrained="run:runs-a")).name.startswith(twin.stem + "_")
    assert len(read_results(tmp_path / "twins")) == 2
    assert other.main_metric == "knn20_acc1"
    clip_benchmarks_build(sorted((tmp_path / "results").iterdir()), tmp_path / "build.csv")
    rows = {row["task"]: row for row in csv.DictReader((tmp_path / "build.csv").open())}
    assert rows["linear_probe"]["lp_acc1"] == "0.75" and rows["linear_probe"]["lp_acc5"] == ""
    assert rows["knn"]["model_fullname"] == "vit_b32 run:runs/a"


def test_clip_benchmarks_own_files_are_read(tmp_path):
    theirs = {"dataset": "wds/mnist", "model": "ViT-B-32", "pretrained": "laion400m", "task": "zeroshot_classification"}
    theirs |= {"metrics": {"acc1": 0.5, "acc5": math.nan, "mean_per_class_recall": 0.5}, "language": "en"}
    (tmp_path / "x.json").write_text(json.dumps(theirs))
    assert read_result(tmp_path / "x.json").metrics == {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.5}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", "no object"),
        ('{"dataset": 3}', "'dataset' is 3"),
        ('{"dataset": "a", "model": "b", "pretrained": "c", "task": "knn"}', "'metrics' is 'None'"),
        (
            '{"dataset": "a", "model": "b", "pretrained": "c", "task": "knn", "metrics": {"x": "y"}}',
            "metric 'x' is 'y'",
        ),
    ],
)
def test_what_is_no_result(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=rf"x\.json .*{message}.*expected a JSON object"):
        read_results(tmp_path)


def test_no_results_and_faults_of_the_caller(tmp_path):
    with pytest.raises(DataError, match="holds no result"):
        read_results(tmp_path)
    for bad in ({"task": "probe"}, {"metrics": {}}, {"metrics": {"x": math.inf}}):
        with pytest.raises(ValueError):
            write_result(tmp_path, a_result(**bad))
