"""What zero-shot classification and retrieval have in common: sets one after the other, results kept, lines printed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlcd_ds import collectives
from mlcd_ds.config import TextEvaluationConfig
from mlcd_ds.evaluation.results import Result, find_result, write_result
from mlcd_ds.evaluation.sets import KEPT, local_files, model_files, settings_of
from mlcd_ds.evaluation.towers import TestSet, Towers, find_test_sets, load_towers
from mlcd_ds.files import make_folder
from mlcd_ds.topology import Topology

Evaluate = Callable[[TextEvaluationConfig, TestSet, Towers, Topology], Result]


def evaluate_text_sets(
    config: TextEvaluationConfig, task: str, evaluate: Evaluate, files: Sequence[str] | None = None
) -> list[Result]:
    """Evaluates every set that `config` names; rank 0 writes a result file as each is done, and a line; then which sets were
    left out, and why.

    A result in --output_dir that these towers and settings have made, newer than its inputs, is kept, unless --overwrite.
    task: of the results of `evaluate`. files: those by which `--datasets all` knows a set, see `find_test_sets`.
    Raises what `evaluate` raises, the sets before it done.
    """
    topology = Topology.from_environment()
    if topology.is_distributed:
        topology.start(config.timeout_minutes)
    if topology.is_main and config.output_dir is not None:
        make_folder(Path(config.output_dir))
    sets, left_out = collectives.on_main(topology, find_test_sets, config, files)
    towers = load_towers(config, topology.device)
    results = []
    kept = collectives.on_main(topology, _finished, config, task, sets, towers)
    for tested in sets:
        result = kept.get(tested.name)
        if result is None:
            result = evaluate(config, tested, towers, topology)
            result = replace(result, details=result.details | _origin(config, tested, towers))
        results.append(result)
        if topology.is_main:
            written = ""
            if tested.name in kept:
                written = f"; {KEPT}"
            elif config.output_dir is not None:
                written = f"; {write_result(config.output_dir, result)}"
            shown = ", ".join(
                f"{name} {value:.4f}" for name, value in result.metrics.items() if value is not None and value == value
            )
            skipped = f"; skipped {result.details['skipped']}" if result.details["skipped"] else ""
            print(f"{result.pretrained} on {tested.name}: {shown}{_counts(result)}{skipped}{written}", flush=True)
    if topology.is_main and left_out:
        print(f"left out ({len(left_out)}): {', '.join(left_out)}", flush=True)
    topology.stop()
    return results


def _origin(config: TextEvaluationConfig, tested: TestSet, towers: Towers) -> dict:
    """What of a result's details says how it was made."""
    return {"folder": str(tested.folder), "encoder": towers.identity, "settings": settings_of(config)}


def _finished(config: TextEvaluationConfig, task: str, sets: list[TestSet], towers: Towers) -> dict[str, Result]:
    """{set: its result} of those that need not be evaluated."""
    if config.output_dir is None or config.overwrite:
        return {}
    named = [Path(file) for name in ("classnames", "templates") if (file := getattr(config, name, None))]
    found = {}
    for tested in sets:
        details = _origin(config, tested, towers)
        blank = Result(tested.name, towers.name, config.model, task, {"none": None}, config.language, details)
        # Class names, templates and the kind of the set lie beside its folders of tars.
        beside = [path for path in tested.folder.glob("*") if path.is_file()]
        inputs = [*local_files([tested.shards]), *model_files(config.model), *beside, *filter(Path.exists, named)]
        if (result := find_result(config.output_dir, blank, inputs)) is not None:
            found[tested.name] = result
    return found


def _counts(result: Result) -> str:
    details = result.details
    if "n_texts" in details:
        same = details["n_texts"] - details["distinct_texts"]
        return f"; {details['n_images']} images, {details['n_texts']} texts" + (
            f", {same} of which repeat another" if same else ""
        )
    return f"; {details['n_test']} images, {details['num_classes']} classes x {details['templates']} templates"
