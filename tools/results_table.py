"""A table of several probes' results.

python tools/results_table.py --results 'input features=features.json,trained=trained.json'
"""

import json
import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ResultsTableConfig
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.topology import Topology


def results_table(config: ResultsTableConfig) -> None:
    """Prints name, mAP and model of each result file that tools/linear_probe.py wrote."""
    if not Topology.from_environment().is_main:
        return
    rows = [("", "mAP", "features", "model")]
    for item in config.results.split(","):
        name, equals, path = item.partition("=")
        if not (equals and name.strip() and path.strip()):
            raise ConfigError(f"--results: {item!r} is not NAME=FILE")
        try:
            result = json.loads(Path(path.strip()).read_text(encoding="utf-8"))
            rows.append((name.strip(), f"{result['mAP']:.3f}", str(result["feature_dim"]), result["model"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path.strip()} is no result of tools/linear_probe.py: {error!r}") from None
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, score, width, model in rows:
        print(f"{name:<{widths[0]}}  {score:>{widths[1]}}  {width:>{widths[2]}}  {model}")


if __name__ == "__main__":
    cli.run(fire.Fire, results_table, ResultsTableConfig)
