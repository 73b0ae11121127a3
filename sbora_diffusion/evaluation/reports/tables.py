"""An evaluation's tables, in Markdown that is aligned in a terminal too."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sbora_diffusion.evaluation.judges.base import Metric
from sbora_diffusion.evaluation.metrics.bootstrap import Estimate, format_estimate
from sbora_diffusion.evaluation.reports.results import Report, Result

_HASH = re.compile(r"[0-9a-f]{64}")


def summary(report: Report) -> str:
    """Return a Markdown table of the main scores, a row for each result and each difference."""
    return _table(report, main_metrics(report.metrics))


def to_markdown(report: Report) -> str:
    """Return all tables of a report."""
    parts = [f"# {report.title}", _conditions(report.about), summary(report)]
    parts += ["## All scores", _table(report, report.metrics), "## Each prompt"]
    parts += [_prompt_table(result, main_metrics(report.metrics)) for result in report.results]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns are aligned in plain text."""
    escaped = [[cell.replace("|", r"\|").replace("<", r"\<") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *escaped, strict=True)]
    lines = [head, ["-" * width for width in widths], *escaped]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def main_metrics(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the metrics that a summary shows."""
    return {key: metric for key, metric in metrics.items() if metric.is_main}


def _table(report: Report, metrics: Mapping[str, Metric]) -> str:
    columns = [metric for metric in metrics if any(metric in result.scores for result in report.results)]
    rows = []
    for result in report.results:
        count = str(sum(map(len, result.images)))
        rows.append([_label(result), result.model, count, *_cells(result.estimates(), columns)])
    for concept, change in report.retention().items():
        rows.append([concept, "merged − single", "", *_cells(change, columns, "+")])
    return markdown_table(["concept", "model", "n", *(metrics[metric].title for metric in columns)], rows)


def _prompt_table(result: Result, metrics: Mapping[str, Metric]) -> str:
    columns = [metric for metric in metrics if metric in result.scores]
    rows = [
        [prompt, *(f"{result.scores[metric][number].mean():.3f}" for metric in columns)]
        for number, prompt in enumerate(result.prompts)
    ]
    head = ["prompt", *(metrics[metric].title for metric in columns)]
    return f"{_label(result)}, {result.model}\n\n{markdown_table(head, rows)}"


def _conditions(about: Mapping[str, Any]) -> str:
    judges = [key for key, value in about.items() if isinstance(value, Mapping) and "weights" in value]
    keys = ("adapters", "merged", "base", "suite", *judges, "sampling", "seeds", "command")
    lines = [f"- {key}: {_on_one_line(about[key])}" for key in keys if about.get(key)]
    return "\n".join([*lines, "- means with bootstrap 95 % intervals over prompts and seeds"])


def _label(result: Result) -> str:
    others = [concept for concept in result.shown if concept != result.concept]
    return f"{result.concept} (with {', '.join(others)})" if others else result.concept


def _cells(estimates: Mapping[str, Estimate], columns: Iterable[str], sign: str = "") -> list[str]:
    return [format_estimate(estimates[column], sign) if column in estimates else "–" for column in columns]


def _on_one_line(value: Any) -> str:
    """Return a JSON value in one line: hashes shortened, and of texts only their number."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_on_one_line(inner)}" for key, inner in value.items() if inner not in (None, ""))
    if isinstance(value, list):
        return str(len(value)) if any(isinstance(entry, str) for entry in value) else ", ".join(map(str, value))
    return value[:16] if isinstance(value, str) and _HASH.fullmatch(value) else str(value)
