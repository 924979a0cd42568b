"""A table of several probes' results.

python tools/results_table.py --results 'input features=features.json,trained=trained.json'
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ResultsTableConfig
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.results import read_result
from mlcd_ds.topology import Topology

SHORT = {"lp_mean_average_precision": "mAP", "lp_acc1": "accuracy"}


def results_table(config: ResultsTableConfig) -> None:
    """Prints name, main metric and model of each result file that an evaluation tool wrote."""
    if not Topology.from_environment().is_main:
        return
    rows, columns = [], []
    for item in config.results.split(","):
        name, equals, path = item.partition("=")
        if not (equals and name.strip() and path.strip()):
            raise ConfigError(f"--results: {item!r} is not NAME=FILE")
        result = read_result(path.strip())
        if result.score is None:
            raise DataError(f"{path.strip()} has no {result.main_metric}")
        columns.append(SHORT.get(result.main_metric, result.main_metric))
        width = str(result.details.get("feature_dim", ""))
        rows.append((name.strip(), f"{result.score:.3f}", width, f"{result.model} {result.pretrained}"))
    metric = columns[0] if len(set(columns)) == 1 else "score"
    if metric == "score":
        rows = [(*row[:3], f"{row[3]} ({column})") for row, column in zip(rows, columns, strict=True)]
    rows.insert(0, ("", metric, "features", "model"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, score, width, model in rows:
        print(f"{name:<{widths[0]}}  {score:>{widths[1]}}  {width:>{widths[2]}}  {model}")


if __name__ == "__main__":
    cli.run(fire.Fire, results_table, ResultsTableConfig)
