"""A folder of results as one Markdown table, and as one HTML page with bars of the differences between two runs.

python tools/report.py --results results/ --output report.html --markdown report.md --names 'cd=run:cd/,mlcd=run:mlcd/'
"""

import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlcd_ds import cli
from mlcd_ds.config import ReportConfig
from mlcd_ds.evaluation.report import make_report, markdown
from mlcd_ds.topology import Topology


def report(config: ReportConfig) -> None:
    """Gathers result files into tables, a page, and bars of the differences between two runs."""
    if not Topology.from_environment().is_main:  # one process does it
        return
    made = make_report(config)
    if config.markdown is None:
        print(markdown(made))
    rows = sum(not row.mean_of for section in made.sections for row in section.rows)
    files = [path for path in (config.output, config.markdown) if path is not None]
    print(f"{len(made.runs)} run(s), {rows} figures each{': ' + ', '.join(files) if files else ''}")


if __name__ == "__main__":
    cli.run(fire.Fire, report, ReportConfig)
