"""Many result files as tables: Markdown, and one HTML page with bars of the differences between two runs.

A row is a set with a metric, a column a run: an architecture with its weights. Means are over the sets that every run has a
figure for, and say how many those are; another mean would compare different things.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mlcd_ds.clustering.charts import difference_chart
from mlcd_ds.config import ReportConfig
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.results import MAIN_METRIC, Result, read_results, usual_metric
from mlcd_ds.files import make_folder, write_text

TITLES = {
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbours",
    "zeroshot_classification": "Zero-shot classification",
    "zeroshot_retrieval": "Zero-shot retrieval",
    "finetune": "Fine-tuning",
}
EVERY_METRIC = ("zeroshot_retrieval",)
"""Tasks whose metrics are all shown; of the others the main one."""
NOTHING = "–"
DIFFERENT = "Probed in different ways, so that differences are not of the models alone:"
STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1100px; margin: 24px auto; padding: 0 20px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 36px 0 6px; border-bottom: 1px solid #ccc; }
h3 { font-size: 16px; margin: 22px 0 4px; } p { max-width: 800px; margin: 6px 0; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin: 10px 0; }
td, th { padding: 3px 18px 3px 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } th.n { max-width: 170px;
       overflow-wrap: anywhere; } tbody tr { border-top: 1px solid #e4e4e4; }
tr.mean td { border-top: 2px solid #888; font-weight: 600; } .best { font-weight: 600; }
.small { font-size: 13px; color: #444; }
svg { display: block; margin: 8px 0; max-width: 100%; height: auto; } svg text { font-size: 12px; fill: #333; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Row:
    """dataset, metric: what was measured. scores: of each run, None where there is none. mean_of: of a mean, over how many
    sets."""

    dataset: str
    metric: str
    scores: tuple[float | None, ...]
    mean_of: int = 0


@dataclass(frozen=True)
class Section:
    """The rows of one task. incomplete: sets that not every run has. protocols: {model and weights: how it was
    probed}, where that differs."""

    task: str
    rows: list[Row]
    incomplete: list[str]
    protocols: dict[str, str]


@dataclass(frozen=True)
class Report:
    """runs: labels of the columns. weights: architecture and weights of each."""

    runs: list[str]
    weights: list[str]
    sections: list[Section]


def make_report(config: ReportConfig) -> Report:
    """Reads all results and writes what `config` asks for.

    Raises DataError for a file that is no result, or two of the same run, set, task and metric; ConfigError for names or
    runs that are not there.
    """
    found: dict[Path, Result] = {}
    for folder in config.results.split("::"):
        found |= read_results(folder.strip())
    named = _labels(config, found)
    pair = _pair(config, list(named.values()))
    report = Report(list(named.values()), list(named), _sections(found, list(named)))
    if config.markdown is not None:
        make_folder(Path(config.markdown).parent)
        write_text(Path(config.markdown), markdown(report))
    if config.output is not None:
        make_folder(Path(config.output).parent)
        write_text(Path(config.output), page(report, pair, config.title))
    return report


def _labels(config: ReportConfig, found: dict[Path, Result]) -> dict[str, str]:
    """{full name of a run: its label}, in the order of the columns."""
    full = sorted({result.full_name for result in found.values()})
    pretrained = {result.full_name: result.pretrained for result in found.values()}
    if config.names is None:
        short = list(pretrained.values())
        return {name: pretrained[name] if short.count(pretrained[name]) == 1 else name for name in full}
    labels: dict[str, str] = {}
    for item in config.names.split(","):
        label, equals, wanted = item.partition("=")
        matches = [name for name in full if wanted.strip() in (name, pretrained[name])]
        if not equals or not label.strip() or len(matches) != 1:
            raise ConfigError(
                f"--names: {item.strip()!r} names {len(matches)} runs. Write LABEL=PRETRAINED (or LABEL=MODEL "
                f"PRETRAINED), of: "
                f"{'; '.join(full)}"
            )
        labels[matches[0]] = label.strip()
    if len(set(labels.values())) < len(config.names.split(",")):
        raise ConfigError(f"--names {config.names!r} gives one label, or one run, twice")
    return labels


def _pair(config: ReportConfig, labels: list[str]) -> tuple[int, int] | None:
    if config.compare is None:
        return (0, 1) if len(labels) == 2 else None
    wanted = [part.strip() for part in config.compare.split(",")]
    if len(wanted) != 2 or not set(wanted) <= set(labels) or wanted[0] == wanted[1]:
        raise ConfigError(
            f"--compare {config.compare!r}: expected two of the runs {'; '.join(labels)}, joined by a comma"
        )
    return labels.index(wanted[0]), labels.index(wanted[1])


def _sections(found: dict[Path, Result], runs: list[str]) -> list[Section]:
    origin: dict[tuple, Path] = {}
    measured: dict[str, dict[str, list[Result]]] = {}
    for file, result in found.items():
        if result.full_name not in runs:
            continue
        dataset = result.dataset if result.language == "en" else f"{result.dataset} ({result.language})"
        for metric in list(result.metrics) if result.task in EVERY_METRIC else [result.main_metric]:
            place = (result.task, dataset, metric, result.full_name)
            if place in origin:
                raise DataError(
                    f"{origin[place]} and {file} are both {metric} of {result.full_name} on {dataset}: keep one of them"
                )
            origin[place] = file
        measured.setdefault(result.task, {}).setdefault(dataset, []).append(result)
    order = [task for task in TITLES if task in measured] + sorted(set(measured) - set(TITLES))
    return [_section(task, _cells(measured[task]), runs, _protocols(measured[task], runs)) for task in order]


def _cells(measured: dict[str, list[Result]]) -> dict[tuple[str, str], dict[str, float | None]]:
    """{(set, metric): {run: score}} of the metrics that are shown."""
    cells: dict[tuple[str, str], dict[str, float | None]] = {}
    for dataset, results in measured.items():
        one = _common_metric(results)
        for result in results:
            every = result.task in EVERY_METRIC
            for metric in list(result.metrics) if every else [one or result.main_metric]:
                cells.setdefault((dataset, metric), {})[result.full_name] = result.metrics.get(metric)
    return cells


def _common_metric(results: list[Result]) -> str | None:
    """The metric that one set's results are compared by, of those that all have: the set's usual one, else a main one
    (first those that files state), else any. None where they have none in common, or a run has two results."""
    common = [name for name in results[0].metrics if all(result.metrics.get(name) is not None for result in results)]
    if len({result.full_name for result in results}) < len(results):
        return None
    stating_first = sorted(results, key=lambda result: MAIN_METRIC not in result.details)
    wanted = [usual_metric(results[0].task, results[0].dataset), *(result.main_metric for result in stating_first)]
    if len(set(wanted[1:])) == 1:
        return wanted[1]
    return next((name for name in (*wanted, *common) if name in common), None)


def _protocols(measured: dict[str, list[Result]], runs: list[str]) -> dict[str, str]:
    """{run: how it was probed}, where runs measured a set's same metric by probes of different protocols; else nothing."""
    ways: dict[str, list[str]] = {}
    for results in measured.values():
        if len({_protocol(result) for result in results}) > 1 and _common_metric(results):
            for result in results:
                ways.setdefault(result.full_name, []).append(_protocol(result))
    return {run: " / ".join(dict.fromkeys(ways[run])) for run in runs if run in ways}


def _protocol(result: Result) -> str:
    """Of a linear probe, as its file says; CLIP_benchmark's files say nothing. Empty for other tasks."""
    if result.task != "linear_probe":
        return ""
    unsaid = "not said in its files (CLIP_benchmark fits by AdamW, so many epochs, weight decay given or swept)"
    return str(result.details.get("protocol") or unsaid)


def _section(
    task: str, cells: dict[tuple[str, str], dict[str, float | None]], runs: list[str], protocols: dict[str, str]
) -> Section:
    rows = [
        Row(dataset, metric, tuple(scores.get(run) for run in runs))
        for (dataset, metric), scores in sorted(cells.items())
    ]
    complete = [row for row in rows if None not in row.scores]
    incomplete = sorted({row.dataset for row in rows if None in row.scores})
    if task in EVERY_METRIC:
        groups = {
            metric: [row for row in complete if row.metric == metric]
            for metric in dict.fromkeys(r.metric for r in rows)
        }
    else:
        groups = {"": complete}
    for metric, group in groups.items():
        if len(group) > 1:
            means = tuple(sum(column) / len(group) for column in zip(*(row.scores for row in group), strict=True))
            rows.append(Row("mean", metric, means, len(group)))
    return Section(task, rows, incomplete, protocols)


def title_of(task: str) -> str:
    """A task's name for people."""
    return TITLES.get(task, task.replace("_", " "))


def _name(row: Row) -> str:
    return f"mean of {row.mean_of} sets" if row.mean_of else row.dataset


def _score(score: float | None) -> str:
    return NOTHING if score is None else f"{100 * score:.1f}"


def markdown(report: Report) -> str:
    """A table per task, in per cent."""
    lines = []
    for section in report.sections:
        lines += [f"## {title_of(section.task)}", "", "| set | metric | " + " | ".join(map(_plain, report.runs)) + " |"]
        lines.append("|---|---|" + "---:|" * len(report.runs))
        for row in section.rows:
            cells = [_plain(_name(row)), row.metric, *map(_score, row.scores)]
            lines.append("| " + " | ".join(cells) + " |")
        if section.protocols:
            lines += ["", DIFFERENT, ""]
            lines += [f"- {_plain(label)}: {_plain(way)}" for label, way in _ways(report, section)]
        if section.incomplete:
            lines += ["", f"In no mean, for not every run has them: {', '.join(map(_plain, section.incomplete))}."]
        lines.append("")
    return "\n".join(lines)


def _ways(report: Report, section: Section) -> list[tuple[str, str]]:
    """(label of a run, its protocol), in the order of the columns."""
    pairs = zip(report.runs, report.weights, strict=True)
    return [(label, section.protocols[full]) for label, full in pairs if full in section.protocols]


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def page(report: Report, pair: tuple[int, int] | None, title: str) -> str:
    """One HTML page that loads nothing; pair: the columns whose difference is drawn, second minus first."""
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        "<p>All figures in per cent, the best of a row in bold.</p><table><tbody>",
    ]
    for label, weights in zip(report.runs, report.weights, strict=True):
        if label != weights:
            parts.append(f"<tr><td>{escape(label)}</td><td><code>{escape(weights)}</code></td></tr>")
    parts.append("</tbody></table>")
    for section in report.sections:
        parts.append(f"<h2>{escape(title_of(section.task))}</h2>")
        if pair is not None:
            parts += _differences(section, report.runs, pair)
        parts += _table(section, report.runs)
        if section.protocols:
            ways = "".join(f"<br>{escape(label)}: {escape(way)}" for label, way in _ways(report, section))
            parts.append(f'<p class="small">{DIFFERENT}{ways}</p>')
        if section.incomplete:
            sets = ", ".join(map(escape, section.incomplete))
            parts.append(f'<p class="small">In no mean, for not every run has them: {sets}.</p>')
    return "".join(parts) + "</body></html>\n"


def _table(section: Section, runs: Sequence[str]) -> list[str]:
    head = "".join(f'<th class="n">{escape(run)}</th>' for run in runs)
    parts = [f'<div class="table"><table><thead><tr><th>set</th><th>metric</th>{head}</tr></thead><tbody>']
    for row in section.rows:
        there = [score for score in row.scores if score is not None]
        best = max(there) if len(there) > 1 else None
        cells = []
        for score in row.scores:
            mark = " best" if None not in (best, score) and _score(score) == _score(best) else ""
            exact = "" if score is None else f' title="{score:.6f}"'
            cells.append(f'<td class="n{mark}"{exact}>{_score(score)}</td>')
        kind = ' class="mean"' if row.mean_of else ""
        parts.append(f"<tr{kind}><td>{escape(_name(row))}</td><td>{escape(row.metric)}</td>{''.join(cells)}</tr>")
    return [*parts, "</tbody></table></div>"]


def _differences(section: Section, runs: Sequence[str], pair: tuple[int, int]) -> list[str]:
    first, second = pair
    both = [row for row in section.rows if row.scores[first] is not None and row.scores[second] is not None]
    both = [row for row in both if not row.mean_of]
    if not both:
        return [f'<p class="small">No set has figures of both {escape(runs[first])} and {escape(runs[second])}.</p>']
    both.sort(key=lambda row: row.scores[first] - row.scores[second])
    values = [100 * (row.scores[second] - row.scores[first]) for row in both]
    names = [f"{row.dataset} {row.metric}" if section.task in EVERY_METRIC else row.dataset for row in both]
    hints = [
        f"{row.dataset}, {row.metric}: {runs[first]} {_score(row.scores[first])}, {runs[second]} "
        f"{_score(row.scores[second])}"
        for row in both
    ]
    better, worse = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return [
        f"<h3>{escape(runs[second])} against {escape(runs[first])}</h3>",
        f"<p>Better on {better}, worse on {worse} of {len(values)}.</p>",
        difference_chart(names, values, hints, f"{runs[second]} minus {runs[first]}, percentage points"),
    ]
