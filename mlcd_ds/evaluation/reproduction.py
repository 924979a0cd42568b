"""The paper's comparison in small, from images with captions to a table: CLIP, cd, mlc and mlcd with one budget.

CLIP is trained from scratch on the captions; the features of its first seed are clustered; cd, mlc and mlcd are trained on
those labels for as many steps of as many images; then every encoder gets a linear probe, nearest neighbours, and a text
tower fitted to it while it is locked (LiT), which is tried by zero-shot classification and retrieval. The ablations
(Table 5) change one number of mlcd each: labels per image l, share of the negatives r, clusters k.

Every stage is one of the tools' commands, printed as it is run. A stage whose result is there is not run again, so a killed
reproduction goes on where it was.
"""

import json
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from mlcd_ds.clustering.charts import difference_chart
from mlcd_ds.config import ReproduceConfig
from mlcd_ds.errors import ConfigError, DataError, differences
from mlcd_ds.evaluation.results import read_result
from mlcd_ds.files import make_folder, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = ("cd", "mlc", "mlcd")
ENCODERS = ("clip", *OBJECTIVES)
FIXED = ("root", "deepspeed_config", "ranks", "model", "text_model", "steps", "lit_steps", "k", "scale", "margin")
"""Settings that a folder keeps; seeds and ablations may be added to it."""
POSITIVES = 8
"""l of the comparison: the paper's."""
SAMPLE_RATE = 0.1
"""r of the comparison: the paper's."""
STORED_LABELS = 16
"""Nearest centers that label files hold, at least: of a run with more labels an image there is another folder."""
NEIGHBOURS = 20
"""k of the nearest-neighbour column."""
HEAD_LR_SCALE = 3
"""For runs of a few thousand steps (docs/results/scenes64.md)."""
IMAGES = {"crop_scale_min": 0.8}
"""Objects of these scenes are as small as a quarter of the side: harder crops cut them away."""


@dataclass(frozen=True)
class Column:
    """One number of the table. task: file stem of the result below an encoder's folder. metric: its name there."""

    title: str
    task: str
    metric: str


PROBE_SCENES = Column("scenes64 probe, mAP", "probe_scenes", "lp_mean_average_precision")
PROBE_CIFAR10 = Column("cifar10 probe", "probe_cifar10", "lp_acc1")
COLUMNS = (
    PROBE_SCENES,
    PROBE_CIFAR10,
    Column(f"cifar10 {NEIGHBOURS}-NN", "knn_cifar10", f"knn{NEIGHBOURS}_acc1"),
    Column("cifar10 zero-shot", "zero_shot", "acc1"),
    Column("image to text R@5", "retrieval", "text_retrieval_recall@5"),
    Column("text to image R@5", "retrieval", "image_retrieval_recall@5"),
)


def reproduce(config: ReproduceConfig) -> str:
    """Runs what has not been run; returns, and writes to output_dir/reproduce.md, the tables, with a chart per ablation.

    Raises DataError where a set is missing below config.root, or a command fails (with the end of its log).
    """
    stages = Stages(config)
    stages.check_data()
    stages.claim()
    ablations = _ablations(config) if config.ablations else []
    _run_all(stages, [run for ablation in ablations for run in ablation.others()])
    seeds = range(config.seeds)
    rows = {encoder: [stages.scores(f"{encoder}_s{seed}", COLUMNS) for seed in seeds] for encoder in ENCODERS}
    rows["untrained"] = [stages.scores("untrained", COLUMNS[:3])]
    rows["clip, its own text tower"] = [stages.scores(f"clip_s{seed}_itself", COLUMNS[3:]) for seed in seeds]
    text = _heading(config) + table(rows, COLUMNS) + "".join(_ablation_table(stages, each) for each in ablations)
    write_text(Path(config.output_dir) / "reproduce.md", text)
    return text


def _run_all(stages: "Stages", ablations: Sequence["HeadRun"]) -> None:
    """Runs every stage, `jobs` encoders at a time; seed by seed, then the ablations.

    The first failure is raised when what runs beside it has ended; nothing new is begun.
    """
    config, seeds = stages.config, range(stages.config.seeds)
    with ThreadPoolExecutor(config.jobs) as pool:
        try:
            stages.make_tokenizer()
            clips = [pool.submit(stages.train_clip, seed) for seed in seeds]
            clips[0].result()
            for k in dict.fromkeys((config.k, *(run.k for run in ablations))):
                pool.submit(stages.cluster, k).result()
            jobs = []
            for seed in seeds:
                jobs += [
                    pool.submit(stages.head_encoder, _head_run(config, name, seed), lit=True) for name in OBJECTIVES
                ]
                jobs.append(pool.submit(stages.clip_encoder, seed, clips[seed]))
            jobs += [pool.submit(stages.head_encoder, run) for run in ablations]
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    stages.evaluate("untrained", f"untrained:{stages.run_of('mlcd_s0')}")


@dataclass(frozen=True)
class HeadRun:
    """One training on cluster labels. name: of its folders; k, l, r as in the paper's Table 5."""

    name: str
    objective: str
    seed: int
    k: int
    l: int = POSITIVES
    r: float = SAMPLE_RATE


def _head_run(config: ReproduceConfig, objective: str, seed: int) -> HeadRun:
    """A run of the comparison."""
    return HeadRun(f"{objective}_s{seed}", objective, seed, config.k)


@dataclass(frozen=True)
class Ablation:
    """mlcd with one number changed. letter: its name. own: its value in the comparison. rows: its values -> their runs."""

    letter: str
    own: float
    rows: Mapping[float, Sequence[HeadRun]]

    def others(self) -> list[HeadRun]:
        """The runs that the comparison does not have."""
        return [run for value, runs in self.rows.items() if value != self.own for run in runs]


def _ablations(config: ReproduceConfig) -> list[Ablation]:
    ablations = []
    for letter, values in (("l", config.ablate_l), ("r", config.ablate_r), ("k", config.ablate_k)):
        own, rows = getattr(_head_run(config, "mlcd", 0), letter), {}
        for value in values:
            if value == own:
                rows[value] = [_head_run(config, "mlcd", seed) for seed in range(config.seeds)]
                continue
            runs = [_head_run(config, "mlcd", seed) for seed in range(config.ablation_seeds)]
            changed = {letter: type(own)(value)}
            rows[value] = [replace(run, name=f"mlcd_{letter}{value:g}_s{run.seed}", **changed) for run in runs]
        ablations.append(Ablation(letter, own, rows))
    return ablations


def _ablation_table(stages: "Stages", ablation: Ablation) -> str:
    """The ablation's table in Markdown; writes its chart beside it where it has the comparison's own value."""
    columns, letter = (PROBE_SCENES, PROBE_CIFAR10), ablation.letter
    own = f"{letter} = {ablation.own:g}"
    rows = {
        f"{letter} = {value:g}": [stages.scores(run.name, columns) for run in runs]
        for value, runs in ablation.rows.items()
    }
    parts = [f"\n## mlcd at other {letter}\n\n", table(rows, columns)]
    if own in rows:
        means = {name: 100 * statistics.mean(score[PROBE_SCENES.title] for score in row) for name, row in rows.items()}
        gains = [mean - means[own] for mean in means.values()]
        hints = [f"{name}: {gain:+.2f} points" for name, gain in zip(rows, gains, strict=True)]
        chart = difference_chart(list(rows), gains, hints, f"points of scenes64 mAP against {own}")
        write_text(Path(stages.config.output_dir) / f"ablation_{letter}.svg", chart)
        parts.append(f"\n![mAP against {own}](ablation_{letter}.svg)\n")
    return "".join(parts)


def table(rows: Mapping[str, Sequence[Mapping[str, float]]], columns: Sequence[Column]) -> str:
    """A Markdown table: per row and column the mean over its seeds in per cent, and their standard deviation from two on.

    rows: name -> per seed {column title: share}. A column that a row does not have stays empty.
    """
    lines = ["| | " + " | ".join(column.title for column in columns) + " | seeds |", "|---" * (len(columns) + 2) + "|"]
    for name, seeds in rows.items():
        cells = []
        for column in columns:
            values = [100 * scores[column.title] for scores in seeds if column.title in scores]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def _heading(config: ReproduceConfig) -> str:
    return (
        f"{config.model}, {config.steps} steps each (CLIP from scratch, cd, mlc, mlcd), {config.lit_steps} steps of LiT, "
        f"{config.ranks} ranks, `{config.deepspeed_config}`, k = {config.k}, l = {POSITIVES}, r = {SAMPLE_RATE}, "
        f"S = {config.scale:g}, margin {config.margin:g}. Per cent; "
        "mean and standard deviation over seeds. The labels of all seeds are from the first seed's CLIP.\n\n"
    )


class Stages:
    """The commands, and where their results lie: runs/NAME, results/NAME/TASK.json, logs/NAME.log below output_dir."""

    def __init__(self, config: ReproduceConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.scenes, self.cifar10 = Path(config.root) / "scenes64", Path(config.root) / "cifar10"
        self.tokenizer = self.folder / "tokenizer.json"

    def check_data(self) -> None:
        """Raises DataError for a split without tars."""
        for split in (folder / part for folder in (self.scenes, self.cifar10) for part in ("train", "test")):
            if not any(split.glob("*.tar")):
                raise DataError(
                    f"no tars in {split}: expected below --root scenes64 (KEY.jpg, KEY.txt, KEY.json with classes) and "
                    "cifar10 (KEY.jpg, KEY.cls; classnames.txt, zeroshot_classification_templates.txt), each with train/ "
                    "and test/"
                )

    def claim(self) -> None:
        """Notes the settings that every stage depends on. Raises ConfigError for a folder that was begun with others."""
        now = {name: getattr(self.config, name) for name in FIXED}
        file = make_folder(self.folder) / "settings.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else now
        if before != now:
            raise ConfigError(
                f"{self.folder} was begun with other settings ({differences(before, now)}), and what is finished there is "
                "not run again: give those, or choose another --output_dir"
            )
        write_json(file, now)

    def run_of(self, name: str) -> Path:
        """The run folder of an encoder."""
        return self.folder / "runs" / name

    def make_tokenizer(self) -> None:
        """A small vocabulary of the captions."""
        self._run(
            "tokenizer", self.tokenizer.exists, "train_tokenizer.py",
            {"shards": self.scenes / "train/*.tar", "vocab_size": 1024, "output": self.tokenizer},
        )  # fmt: skip

    def clip_flags(self) -> dict:
        """Flags of training on captions."""
        return {"objective": "clip", "tokenizer": self.tokenizer, "text_model": self.config.text_model}

    def cluster(self, k: int) -> None:
        """Features of the first CLIP run, k centers, the nearest of them to every image."""
        features, centers, labels = self.folder / "features", self.folder / f"centers_{k}", self.labels_of(k)
        shards = self.scenes / "train/*.tar"
        self._run(
            "features", self._marker("features").exists, "extract_features.py",
            {"shards": shards, "model": f"run:{self.run_of('clip_s0')}", "output_dir": features},
        )  # fmt: skip
        self._run(
            f"centers_{k}", self._marker(f"centers_{k}").exists, "cluster.py",
            {"features": features, "k": k, "output_dir": centers},
        )  # fmt: skip
        self._run(
            labels.name, self._marker(labels.name).exists, "assign_labels.py",
            {"features": features, "centers": centers, "output_dir": labels, "top": self._most_labels()},
        )  # fmt: skip

    def labels_of(self, k: int) -> Path:
        """Folder of the labels of k clusters."""
        most = self._most_labels()
        return self.folder / (f"labels_{k}" if most == STORED_LABELS else f"labels_{k}_top{most}")

    def _most_labels(self) -> int:
        return int(max(STORED_LABELS, *self.config.ablate_l))

    def train(self, name: str, flags: dict) -> None:
        """One run of train.py on the scenes, --resume auto."""
        run = self.run_of(name)
        own = {
            "deepspeed_config": self.config.deepspeed_config, "shards": self.scenes / "train/*.tar",
            "model": self.config.model, "output_dir": run, "steps": self.config.steps, "resume": "auto",
            "warmup_steps": self.config.steps // 20, "workers": 0, "save_every_steps": 500, "keep_last": 1,
        }  # fmt: skip
        self._run(name, lambda: _done(run), "../mlcd_ds/train.py", own | IMAGES | flags, ranks=self.config.ranks)

    def train_clip(self, seed: int) -> None:
        """CLIP from scratch."""
        self.train(f"clip_s{seed}", self.clip_flags() | {"seed": seed})

    def clip_encoder(self, seed: int, trained: Future) -> None:
        """What the table says of a CLIP run, when `trained` is done."""
        trained.result()
        name = f"clip_s{seed}"
        self.evaluate(name)
        self.lit(name, seed)
        self.zero_shot(f"{name}_itself", self.run_of(name))

    def head_encoder(self, run: HeadRun, lit: bool = False) -> None:
        """One training on cluster labels, and what the tables say of it; with `lit` also by a text tower."""
        flags = {
            "labels": self.labels_of(run.k), "centers": self.folder / f"centers_{run.k}",
            "num_positives": run.l, "sample_rate": run.r, "objective": run.objective, "seed": run.seed,
            "scale": self.config.scale, "margin": self.config.margin, "head_lr_scale": HEAD_LR_SCALE,
        }  # fmt: skip
        self.train(run.name, flags)
        self.evaluate(run.name)
        if lit:
            self.lit(run.name, run.seed)

    def evaluate(self, name: str, model: str | None = None) -> None:
        """Probes on both sets and nearest neighbours on cifar10."""
        model = model or f"run:{self.run_of(name)}"
        results = self.folder / "results" / name
        for task, tool, dataset in (
            ("probe_scenes", "linear_probe.py", self.scenes),
            ("probe_cifar10", "linear_probe.py", self.cifar10),
            ("knn_cifar10", "knn.py", self.cifar10),
        ):
            flags = {
                "model": model, "train_shards": dataset / "train/*.tar", "test_shards": dataset / "test/*.tar",
                "dataset_name": dataset.name, "cache": self.folder / "cache", "output": results / f"{task}.json",
            }  # fmt: skip
            self._run(f"{name}_{task}", (results / f"{task}.json").exists, tool, flags)

    def lit(self, name: str, seed: int) -> None:
        """Fits a text tower to the locked encoder, and tries the pair."""
        flags = {"init_from": self.run_of(name), "lock_image": True, "seed": seed, "steps": self.config.lit_steps}
        flags["warmup_steps"] = self.config.lit_steps // 20
        self.train(f"{name}_lit", self.clip_flags() | flags)
        self.zero_shot(name, self.run_of(f"{name}_lit"))

    def zero_shot(self, name: str, run: Path) -> None:
        """Zero-shot classification of cifar10 and retrieval among the scenes, by an image and a text tower."""
        for task, tool, dataset in (
            ("zero_shot", "zero_shot.py", "cifar10"),
            ("retrieval", "retrieval.py", "scenes64"),
        ):
            folder = self.folder / "results" / name / task
            flags = {
                "model": f"run:{run}",
                "root": self.config.root,
                "datasets": dataset,
                "output_dir": folder,
            }
            self._run(f"{name}_{task}", lambda folder=folder: any(folder.glob("*.json")), tool, flags)

    def scores(self, name: str, columns: Sequence[Column]) -> dict[str, float]:
        """{column title: share} of one encoder."""
        found = {}
        for column in columns:
            path = self.folder / "results" / name / f"{column.task}.json"
            if not path.exists():
                (path,) = (self.folder / "results" / name / column.task).glob("*.json")
            metrics = read_result(path).metrics
            if metrics.get(column.metric) is None:
                raise DataError(f"{path} has no {column.metric}: expected one of {', '.join(metrics)}")
            found[column.title] = metrics[column.metric]
        return found

    def _marker(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.done"

    def _run(self, name: str, done: Callable[[], bool], tool: str, flags: dict, ranks: int | None = None) -> None:
        if done():
            return
        command = [sys.executable, str((ROOT / "tools" / tool).resolve())]
        if ranks is not None:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            command = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(port), command[1]]
        command += [f"--{key}={value}" for key, value in flags.items()]
        log = self.folder / "logs" / f"{name}.log"
        make_folder(log.parent)
        print(f"{time.strftime('%H:%M:%S')} {name}: {shlex.join(command)}", flush=True)
        began = time.monotonic()
        with log.open("ab") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        if code != 0:
            tail = log.read_text(errors="replace")[-2000:]
            raise DataError(
                f"{name} ended with exit code {code}; the same command goes on from there. {log} ends:\n{tail}"
            )
        write_text(self._marker(name), f"{time.monotonic() - began:.0f} s\n")


def _done(run: Path) -> bool:
    status = run / "status.json"
    return status.exists() and json.loads(status.read_text(encoding="utf-8"))["state"] == "done"
