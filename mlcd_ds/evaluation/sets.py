"""One model on many evaluation sets, on any number of ranks: what tools/linear_probe.py and tools/knn.py share.

Tars are shared out over the ranks by their size, and each rank puts the features of its own into the cache; then whole sets
are, and each rank evaluates its own. A set is evaluated by one process, so its figures do not depend on the number of ranks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mlcd_ds import checkpoint, collectives
from mlcd_ds.clustering.features import FeatureFolder
from mlcd_ds.config import EvaluationConfig, TextEvaluationConfig
from mlcd_ds.data.tars import expand_shards, is_url, local_shard
from mlcd_ds.errors import ConfigError, DataError, UserError
from mlcd_ds.evaluation.datasets import KNOWN_SETS, EvaluationSet, find_sets
from mlcd_ds.evaluation.features import (
    Encoder,
    FeatureCache,
    LabelledFeatures,
    encode_shard,
    feature_folders,
    labelled_features,
    labels_of_shard,
    load_probed,
    split_model,
)
from mlcd_ds.evaluation.results import Result, find_result, write_result
from mlcd_ds.files import make_folder
from mlcd_ds.topology import Topology

NOT_THE_RESULTS = frozenset(
    "output output_dir overwrite cache root datasets batch_size workers shard_cache allow_pipe timeout_minutes".split()
)
"""Settings that a result does not depend on."""
KEPT = "newer than its inputs: kept (--overwrite makes it anew)"


@dataclass(frozen=True)
class Task:
    """A set to evaluate, with all that is needed for it."""

    config: EvaluationConfig
    set: EvaluationSet
    encoder: Encoder | None
    cache: FeatureCache | None
    device: torch.device

    def read(self, split: str) -> LabelledFeatures:
        """Features and classes of a split. Raises DataError for what is missing."""
        return labelled_features(self.config, self.encoder, self.cache, self.set.shards[split], split)

    def result(self, task: str, metrics: dict[str, float | None], details: dict) -> Result:
        """A result of this set and model."""
        name = self.encoder.name if self.encoder else FeatureFolder(_train_features(self.config)).model
        details = details | {
            "folder": None if self.set.folder is None else str(self.set.folder),
            "encoder": None if self.encoder is None else self.encoder.identity,
            "settings": settings_of(self.config),
        }
        return Result(self.set.result_name, name, self.config.model, task, metrics, details=details)


@dataclass(frozen=True)
class Evaluated:
    """results: by name of the set, in the order asked for. kept: sets whose result was there. missing: known sets that
    are not below the root. failed: {name: why}."""

    results: dict[str, Result]
    kept: list[str]
    missing: list[str]
    failed: dict[str, str]


def settings_of(config: EvaluationConfig | TextEvaluationConfig) -> dict:
    """What a result depends on beside its inputs."""
    return {name: value for name, value in config.model_dump().items() if name not in NOT_THE_RESULTS}


def evaluate_sets(
    config: EvaluationConfig, topology: Topology, task_name: str, evaluate: Callable[[Task], Result]
) -> Evaluated:
    """`evaluate` on every set that `config` names; results are written as they are made, finished ones are kept.

    With --root a set that cannot be used does not keep the others from being evaluated: it is among `failed`. Raises
    ConfigError for many ranks without --cache, UserError for whatever is wrong with the only set.
    """
    if config.root is None and config.train_shards is None:
        raise ConfigError("no images: name them by --train_shards and --test_shards, or by --root (with --datasets)")
    kind, _ = split_model(config.model)
    if topology.is_distributed and config.cache is None and kind != "features":
        raise ConfigError(
            f"{topology.world_size} ranks share features through files: give --cache FOLDER, one that all ranks see"
        )
    sets, missing = collectives.on_main(topology, _named_sets, config)
    encoder = None if kind == "features" else load_probed(config, topology.device)
    collectives.on_main(topology, FeatureCache.of, config, encoder)  # one rank makes the folders
    cache = FeatureCache.of(config, encoder)
    tasks = {found.name: Task(config, found, encoder, cache, topology.device) for found in sets}
    kept = collectives.on_main(topology, _finished, tasks, task_name)
    todo = [name for name in tasks if name not in kept]
    failed: dict[str, str] = {}
    if cache is not None:
        for part in collectives.all_for_long(topology, _extract, [tasks[name] for name in todo], topology):
            failed |= part
    sizes = {name: _bytes(tasks[name]) for name in todo if name not in failed}
    own = shared_out(sizes, topology.world_size)[topology.rank]
    found: dict[str, Result] = dict(kept)
    for results, problems in collectives.all_for_long(topology, _evaluate, [tasks[name] for name in own], evaluate):
        found |= results
        failed |= problems
    return Evaluated({name: found[name] for name in tasks if name in found}, list(kept), missing, failed)


def shared_out(sizes: dict, ranks: int) -> list[list]:
    """The keys of `sizes` for each rank: the largest first, each to the rank that has least."""
    loads, shares = [0.0] * ranks, [[] for _ in range(ranks)]
    for key in sorted(sizes, key=lambda key: (-sizes[key], str(key))):
        rank = min(range(ranks), key=loads.__getitem__)
        loads[rank] += sizes[key]
        shares[rank].append(key)
    return shares


def _named_sets(config: EvaluationConfig) -> tuple[list[EvaluationSet], list[str]]:
    if config.root is not None:
        sets, missing = find_sets(config.root, config.datasets)
        if not sets:
            raise DataError(
                f"none of the sets {config.datasets!r} lies below {config.root}: expected folders like "
                f"{Path(config.root) / 'cifar10'} with train/ and test/, in CLIP_benchmark's layout"
            )
        return sets, missing
    specs = {"train": config.train_shards, "test": config.test_shards}
    shards = {part: expand_shards(spec, config.allow_pipe) for part, spec in specs.items()}
    return [EvaluationSet(config.dataset_name or config.test_shards, shards, None)], []


def _extract(tasks: list[Task], topology: Topology) -> dict[str, str]:
    """Puts this rank's share of all tars into the cache; {set: problem} of those that cannot be."""
    sizes = {
        (task.set.name, shard): _size(shard) for task in tasks for part in task.set.shards.values() for shard in part
    }
    by_name, failed = {task.set.name: task for task in tasks}, {}
    own = shared_out(sizes, topology.world_size)[topology.rank]
    for name, shard in tqdm(own, desc="tars of this rank", unit="tar", disable=None if topology.is_main else True):
        task = by_name[name]
        if name in failed:
            continue
        try:
            local = local_shard(shard, task.config.shard_cache, task.config.allow_pipe)
            labels_of_shard(local, task.config.classes_key)  # better now than after hours
            encode_shard(task.config, task.encoder, task.cache, local)
        except UserError as error:
            _raise_if_alone(task, error)
            failed[name] = str(error)
    return failed


def _evaluate(tasks: list[Task], evaluate: Callable[[Task], Result]) -> tuple[dict[str, Result], dict[str, str]]:
    results, failed = {}, {}
    for task in tasks:
        try:
            result = evaluate(task)
            for place in (task.config.output, task.config.output_dir):
                if place is not None:
                    write_result(place, result)
            results[task.set.name] = result
        except UserError as error:
            _raise_if_alone(task, error)
            failed[task.set.name] = str(error)
    return results, failed


def _raise_if_alone(task: Task, error: UserError) -> None:
    if task.config.root is None:
        raise error


def _size(shard: str) -> int:
    return 0 if is_url(shard) else Path(shard).stat().st_size


def _bytes(task: Task) -> int:
    return sum(_size(shard) for shards in task.set.shards.values() for shard in shards)


def summary(evaluated: Evaluated) -> str:
    """Which sets are missing, and the mean of the main metrics over sets that it names."""
    scores = {name: result.score for name, result in evaluated.results.items() if result.score is not None}
    lines = []
    if scores:
        named = "all 27 sets" if set(scores) == set(KNOWN_SETS) else f"{', '.join(scores)} ({len(scores)})"
        lines.append(f"mean over {named}: {sum(scores.values()) / len(scores):.4f}")
    without = {name: score for name, score in scores.items() if name != "imagenet1k"}
    if len(without) < len(scores) and set(scores) == set(KNOWN_SETS):
        lines.append(f"mean over the 26 without imagenet1k: {sum(without.values()) / len(without):.4f}")
    unmeasured = [f"{name} ({result.main_metric})" for name, result in evaluated.results.items() if name not in scores]
    if unmeasured:
        lines.append(f"without a figure, in no mean ({len(unmeasured)}): {', '.join(unmeasured)}")
    if evaluated.missing:
        lines.append(f"missing, in no mean ({len(evaluated.missing)}): {', '.join(evaluated.missing)}")
    return "\n".join(lines)


def run_and_tell(
    config: EvaluationConfig,
    evaluate: Callable[[EvaluationConfig, Topology], Evaluated],
    describe: Callable[[Result, str, str], list[str]],
) -> None:
    """The whole of a tool: `evaluate` on all ranks, and on rank 0 a line per set and the summary.

    describe(result, name of the set, whether it was kept or its seconds) -> parts of its line. Raises what `evaluate`
    raises, and DataError as `raise_failed`.
    """
    topology = Topology.from_environment()
    if topology.is_distributed:
        topology.start(config.timeout_minutes)
    if config.output is not None:
        make_folder(Path(config.output).parent)
    evaluated = evaluate(config, topology)
    if topology.is_main:
        for name, result in evaluated.results.items():
            kept = name in evaluated.kept
            print("; ".join(describe(result, name, KEPT if kept else f"{result.details['seconds']:.1f} s")))
        if config.root is not None:
            print(summary(evaluated))
    topology.stop()
    raise_failed(evaluated)


def skipped_images(details: dict) -> list[str]:
    """["skipped ..."] where a split has images that could not be used; else none."""
    skipped = {split: counts for split, counts in details["skipped"].items() if counts}
    return [f"skipped {skipped}"] if skipped else []


def raise_failed(evaluated: Evaluated) -> None:
    """Raises DataError naming the sets that could not be used, if any."""
    if evaluated.failed:
        problems = "; ".join(f"{name}: {why}" for name, why in evaluated.failed.items())
        raise DataError(f"{len(evaluated.failed)} set(s) could not be evaluated, the others were. {problems}")


# ---------------------------------------------------------------------------------------------- results that are there


def _finished(tasks: dict[str, Task], task_name: str) -> dict[str, Result]:
    found = {name: finished_result(task, task_name) for name, task in tasks.items()}
    return {name: result for name, result in found.items() if result is not None}


def finished_result(task: Task, task_name: str) -> Result | None:
    """The result in --output or --output_dir, if this encoder and these settings made it, of this folder, after all
    its inputs were written, and --overwrite is not given; else None."""
    place = task.config.output or task.config.output_dir
    if place is None or task.config.overwrite:
        return None
    return find_result(place, task.result(task_name, {"none": None}, {}), _inputs(task))


def _train_features(config: EvaluationConfig) -> Path:
    return feature_folders(split_model(config.model)[1])[0]


def _inputs(task: Task) -> list[Path]:
    """Local files a result depends on."""
    return [*local_files(task.set.shards.values()), *model_files(task.config.model)]


def local_files(splits: Iterable[Sequence[str]]) -> list[Path]:
    """The tars of some splits that are not remote."""
    return [Path(shard) for shards in splits for shard in shards if not is_url(shard)]


def model_files(model: str) -> list[Path]:
    """Local files that --model names."""
    kind, value = split_model(model)
    if kind in ("run", "untrained"):
        folder = checkpoint.find_encoder(value)
        # An untrained twin depends on the architecture alone.
        files = [folder / ("encoder.safetensors" if kind == "run" else "encoder.json")]
        return files + (sorted(text.glob("*")) if kind == "run" and (text := checkpoint.text_folder(folder)) else [])
    if kind == "features":
        return [file for folder in feature_folders(value) for file in sorted(folder.glob("*/*"))]
    if Path(value).is_dir():
        return sorted(Path(value).glob("*"))
    return [Path(value)] if Path(value).exists() else []
