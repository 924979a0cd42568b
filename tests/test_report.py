"""Results as tables and as a page."""

from xml.etree import ElementTree

import pytest

from mlcd_ds.config import ReportConfig
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.report import make_report, markdown
from mlcd_ds.evaluation.results import Result, write_result


def fill(folder, run: str, scores: dict, task="linear_probe", metric="lp_acc1"):
    for name, score in scores.items():
        found = score if isinstance(score, dict) else {metric: score}
        write_result(folder, Result(name, "vit", f"run:{run}", task, found))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    fill(folder, "a", {"cifar10": 0.5, "pets": 0.7, "dtd": 0.4})
    fill(folder, "b", {"cifar10": 0.625, "pets": 0.65})
    retrieval = {"image_retrieval_recall@5": 0.2, "text_retrieval_recall@5": 0.3}
    fill(folder, "a", {"flickr<30k>": retrieval}, "zeroshot_retrieval")
    fill(folder, "b", {"flickr<30k>": retrieval}, "zeroshot_retrieval")
    return folder


def test_tables_have_means_over_what_all_runs_have(results, tmp_path):
    config = ReportConfig(results=str(results), output=str(tmp_path / "r/r.html"), markdown=str(tmp_path / "r/r.md"))
    report = make_report(config)
    assert report.runs == ["run:a", "run:b"]
    lines = (tmp_path / "r/r.md").read_text().splitlines()
    assert lines == markdown(report).splitlines()
    assert "| cifar10 | lp_acc1 | 50.0 | 62.5 |" in lines and "| dtd | lp_acc1 | 40.0 | – |" in lines
    assert "| mean of 2 sets |  | 60.0 | 63.7 |" in lines or "| mean of 2 sets |  | 60.0 | 63.8 |" in lines
    assert "In no mean, for not every run has them: dtd." in lines
    assert "| flickr<30k> | text_retrieval_recall@5 | 30.0 | 30.0 |" in lines

    text = (tmp_path / "r/r.html").read_text()
    body = text[text.index("<body>") : text.index("</body>") + 7]
    tree = ElementTree.fromstring(body)  # every tag is closed, every text escaped
    assert "http" not in text and "<script" not in text
    bars = [bar.find("title").text for bar in tree.iter("rect")]
    assert bars[:2] == [
        "cifar10, lp_acc1: run:a 50.0, run:b 62.5",
        "pets, lp_acc1: run:a 70.0, run:b 65.0",
    ]
    widths = [float(bar.get("width")) for bar in tree.iter("rect")][:2]
    assert widths[0] == pytest.approx(2.5 * widths[1], abs=0.5)  # +12.5 and -5
    assert "Better on 1, worse on 1 of 2." in body


def test_clip_benchmarks_figures_stand_beside_ours(tmp_path):
    """In one row, by the metric that both have, and the protocols are told."""
    theirs = {"lp_acc1": 0.8, "lp_acc5": 0.9, "lp_mean_per_class_recall": 0.7, "weight_decay": 0.1}
    ours = {"lp_acc1": 0.85, "lp_mean_per_class_recall": 0.75}
    stated = {"main_metric": "lp_mean_per_class_recall", "protocol": "L-BFGS"}
    for dataset, metrics in (("wds/vtab/pets", ours), ("mine", ours)):
        write_result(tmp_path, Result(dataset, "vit", "run:a", "linear_probe", metrics, details=stated))
        write_result(tmp_path, Result(dataset, "ViT-B-32", "laion", "linear_probe", theirs))
    alone = Result("wds/vtab/flowers", "ViT-B-32", "laion", "linear_probe", theirs)
    write_result(tmp_path, alone)
    zero_shot = {"task": "zeroshot_classification", "metrics": {"acc1": 0.5}}  # the same in all programs
    write_result(tmp_path, Result("mine", "vit", "run:a", **zero_shot, details=stated | {"main_metric": "acc1"}))
    write_result(tmp_path, Result("mine", "ViT-B-32", "laion", **zero_shot))
    report = make_report(
        ReportConfig(results=str(tmp_path), names="us=run:a,them=laion", output=str(tmp_path / "r.html"))
    )
    rows = {row.dataset: (row.metric, row.scores) for row in report.sections[0].rows if not row.mean_of}
    assert rows == {
        "wds/vtab/pets": ("lp_mean_per_class_recall", (0.75, 0.7)),
        "mine": ("lp_mean_per_class_recall", (0.75, 0.7)),
        "wds/vtab/flowers": ("lp_mean_per_class_recall", (None, 0.7)),
    }
    text = markdown(report)
    assert (
        text.count("Probed in different ways") == 1
        and "- us: L-BFGS" in text
        and "- them: not said in its files" in text
    )
    assert "<br>us: L-BFGS<br>them: not said" in (tmp_path / "r.html").read_text()


def test_names_order_and_choose(results):
    report = make_report(ReportConfig(results=str(results), names="new=run:b,old=vit run:a", compare="old,new"))
    assert (report.runs, report.weights) == (["new", "old"], ["vit run:b", "vit run:a"])
    assert report.sections[0].rows[0].scores == (0.625, 0.5)
    only = make_report(ReportConfig(results=str(results), names="new=run:b"))
    assert [row.dataset for row in only.sections[0].rows] == ["cifar10", "pets", "mean"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"names": "x=run:c"}, "'x=run:c' names 0 runs.*vit run:a; vit run:b"),
        ({"names": "x=run:a,x=run:b"}, "gives one label, or one run, twice"),
        ({"compare": "run:a"}, "expected two of the runs run:a; run:b"),
        ({"compare": "run:a,run:c"}, "expected two of the runs"),
    ],
)
def test_wrong_names(results, flags, message):
    with pytest.raises(ConfigError, match=message):
        make_report(ReportConfig(results=str(results), **flags))


def test_two_files_of_one_figure(results, tmp_path):
    fill(tmp_path / "more", "a", {"pets": 0.1})
    with pytest.raises(DataError, match="are both lp_acc1 of vit run:a on pets: keep one of them"):
        make_report(ReportConfig(results=f"{results}::{tmp_path / 'more'}"))
