"""What zero-shot classification and retrieval have in common: sets one after the other, results kept, lines printed."""

from collections.abc import Callable
from pathlib import Path

from mlcd_ds import collectives
from mlcd_ds.config import TextEvaluationConfig
from mlcd_ds.evaluation.results import Result, write_result
from mlcd_ds.evaluation.towers import TestSet, Towers, find_test_sets, load_towers
from mlcd_ds.files import make_folder
from mlcd_ds.topology import Topology

Evaluate = Callable[[TextEvaluationConfig, TestSet, Towers, Topology], Result]


def evaluate_text_sets(config: TextEvaluationConfig, evaluate: Evaluate, marker: str | None) -> list[Result]:
    """Evaluates every set that `config` names; rank 0 writes a result file as each is done, and a line.

    marker: the file by which `--datasets all` knows a set. Raises what `evaluate` raises, the sets before it done.
    """
    topology = Topology.from_environment()
    if topology.is_distributed:
        topology.start(config.timeout_minutes)
    if topology.is_main and config.output_dir is not None:
        make_folder(Path(config.output_dir))
    sets = collectives.on_main(topology, find_test_sets, config, marker)
    towers = load_towers(config, topology.device)
    results = []
    for tested in sets:
        result = evaluate(config, tested, towers, topology)
        results.append(result)
        if topology.is_main:
            written = "" if config.output_dir is None else f"; {write_result(config.output_dir, result)}"
            shown = ", ".join(
                f"{name} {value:.4f}" for name, value in result.metrics.items() if value is not None and value == value
            )
            skipped = f"; skipped {result.details['skipped']}" if result.details["skipped"] else ""
            print(f"{result.pretrained} on {tested.name}: {shown}{_counts(result)}{skipped}{written}", flush=True)
    topology.stop()
    return results


def _counts(result: Result) -> str:
    details = result.details
    if "n_texts" in details:
        same = details["n_texts"] - details["distinct_texts"]
        return f"; {details['n_images']} images, {details['n_texts']} texts" + (
            f", {same} of which repeat another" if same else ""
        )
    return f"; {details['n_test']} images, {details['num_classes']} classes x {details['templates']} templates"
