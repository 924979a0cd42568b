"""The reproduction: its table, the order of its commands, and a folder that is gone on with by other settings."""

import subprocess
import threading

import pytest

from mlcd_ds import cli
from mlcd_ds.config import (
    AssignConfig,
    ClusterConfig,
    FeaturesConfig,
    KnnConfig,
    ProbeConfig,
    ReproduceConfig,
    RetrievalConfig,
    RunConfig,
    TokenizerConfig,
    ZeroShotConfig,
)
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation import reproduction
from mlcd_ds.evaluation.reproduction import Column, Stages, table


def test_the_table_has_means_and_spreads_and_leaves_out_what_a_row_lacks():
    columns = [Column("a", "x", "y"), Column("b", "x", "z")]
    found = table({"mlcd": [{"a": 0.5, "b": 0.2}, {"a": 0.7, "b": 0.2}], "untrained": [{"a": 0.1}]}, columns)
    assert found.splitlines() == [
        "| | a | b | seeds |",
        "|---|---|---|---|",
        "| mlcd | 60.0 ± 14.1 | 20.0 ± 0.0 | 2 |",
        "| untrained | 10.0 |  | 1 |",
    ]


def test_a_folder_keeps_its_settings_and_takes_more_seeds(tmp_path):
    def stages(**changed):
        return Stages(ReproduceConfig(root="data", output_dir=str(tmp_path), **changed))

    stages(steps=40).claim()
    stages(steps=40, seeds=5, ablations=False).claim()
    with pytest.raises(ConfigError, match="was begun with other settings .*steps.*choose another --output_dir"):
        stages(steps=80).claim()
    with pytest.raises(DataError, match="no tars in data/scenes64/train"):
        stages().check_data()


TOOLS = {
    "train_tokenizer.py": TokenizerConfig,
    "train.py": RunConfig,
    "extract_features.py": FeaturesConfig,
    "cluster.py": ClusterConfig,
    "assign_labels.py": AssignConfig,
    "linear_probe.py": ProbeConfig,
    "knn.py": KnnConfig,
    "zero_shot.py": ZeroShotConfig,
    "retrieval.py": RetrievalConfig,
}


class Commands:
    """In place of subprocess.run: notes the commands, and what was running when each began; `fails` one of them."""

    def __init__(self, fails: str | None = None):
        self.begun, self.running, self.most, self.fails = [], set(), 0, fails
        self.lock = threading.Lock()

    def __call__(self, command, stdout, stderr, check):
        place = next(i for i, part in enumerate(command) if part.endswith(".py"))
        tool = command[place].rsplit("/", 1)[1]
        flags = cli.parse_flags(command[place + 1 :], TOOLS[tool])
        cli.build(TOOLS[tool], dict(flags))  # the tool would take them
        name = (tool, flags.get("output_dir") or flags.get("output"), flags.get("dataset_name"))
        with self.lock:
            assert name not in [before[0] for before in self.begun], f"{name} is run twice"
            self.begun.append((name, flags))
            self.running.add(name)
            self.most = max(self.most, len(self.running))
        threading.Event().wait(0.002)
        with self.lock:
            self.running.remove(name)
        return subprocess.CompletedProcess(command, 1 if self.fails and self.fails in str(name) else 0)

    def place(self, part: str) -> int:
        return next(i for i, (name, _) in enumerate(self.begun) if part in str(name[:2]))


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_stage_is_run_once_and_after_what_it_needs(tmp_path, monkeypatch, jobs):
    commands = Commands()
    monkeypatch.setattr(reproduction.subprocess, "run", commands)
    monkeypatch.setattr(Stages, "check_data", lambda self: None)
    config = ReproduceConfig(
        root="data", output_dir=str(tmp_path), jobs=jobs, seeds=2, ablation_seeds=3, ablate_l=(1, 8)
    )
    ablations = reproduction._ablations(config)
    assert [len(ablation.others()) for ablation in ablations] == [3, 6, 6]
    reproduction._run_all(Stages(config), [run for ablation in ablations for run in ablation.others()])
    trained = [name[1].rsplit("/", 1)[1] for name, _ in commands.begun if name[0] == "train.py"]
    compared = [f"{name}_s{seed}" for name in ("clip", "cd", "mlc", "mlcd") for seed in (0, 1)]
    changed = [f"mlcd_{what}_s{seed}" for what in ("l1", "r0.01", "r1", "k250", "k4000") for seed in (0, 1, 2)]
    assert sorted(trained) == sorted(compared + [f"{name}_lit" for name in compared] + changed)
    flags = {name[1].rsplit("/", 1)[1]: flags for name, flags in commands.begun if name[0] == "train.py"}
    usual = {"num_positives": "8", "sample_rate": "0.1", "labels": str(tmp_path / "labels_1000"), "objective": "mlcd"}
    for run, own in (
        ("mlcd_s1", {}),
        ("mlcd_l1_s2", {"num_positives": "1"}),
        ("mlcd_r0.01_s2", {"sample_rate": "0.01"}),
        ("mlcd_k250_s2", {"labels": str(tmp_path / "labels_250")}),
    ):
        assert {key: flags[run][key] for key in usual} == usual | own
        assert flags[run]["seed"] == run[-1]
    assert flags["mlcd_s1_lit"]["init_from"] == str(tmp_path / "runs/mlcd_s1")
    for before, after in (
        ("train_tokenizer.py", "runs/clip_s0'"),
        ("runs/clip_s0'", "extract_features.py"),
        ("assign_labels.py", "runs/cd_s0'"),
        ("runs/mlcd_s1'", "results/mlcd_s1/probe"),
        ("runs/mlcd_s1'", "runs/mlcd_s1_lit"),
        ("runs/mlcd_s1_lit", "results/mlcd_s1/zero_shot"),
    ):
        assert commands.place(before) < commands.place(after), (before, after)
    assert commands.most == 1 if jobs == 1 else 1 < commands.most <= jobs


def test_a_failed_stage_ends_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction.subprocess, "run", commands := Commands(fails="runs/mlc_s0"))
    config = ReproduceConfig(root="data", output_dir=str(tmp_path), jobs=2, seeds=2, ablations=False)
    with pytest.raises(DataError, match="mlc_s0 ended with exit code 1; the same command goes on from there"):
        reproduction._run_all(Stages(config), [])
    assert not any("mlcd_s1" in str(name) for name, _ in commands.begun)


def test_more_labels_an_image_may_be_asked_for_later(tmp_path):
    def labels(values):
        stages = Stages(ReproduceConfig(root="data", output_dir=str(tmp_path), ablate_l=values))
        return stages.labels_of(1000).name, stages._most_labels()

    assert labels((1, 8)) == labels((1, 2, 4, 8, 16)) == ("labels_1000", 16)
    assert labels((8, 32)) == ("labels_1000_top32", 32)
