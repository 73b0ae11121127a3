"""An evaluation's tables, in Markdown that lines up in a terminal too."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sbora_diffusion.evaluation.results import Estimate, Report, Result
from sbora_diffusion.evaluation.scores import METRICS

MAIN = ("text_mos", "text_cd", "image", "vision", "success")  # what the summary shows; image alignment never alone
_TOLD = ("adapters", "merged", "base", "suite", "encoder", "vision", "sampling", "seeds", "command")
_HASH = re.compile(r"[0-9a-f]{64}")


def summary(report: Report) -> str:
    """A Markdown table of the main scores, a line for each result and each change."""
    return _table(report, MAIN)


def to_markdown(report: Report) -> str:
    """All tables."""
    parts = [f"# {report.title}", _described(report), summary(report)]
    parts += ["## All scores", _table(report, tuple(METRICS)), "## Each prompt"]
    parts += [_prompt_table(result) for result in report.results]
    return "\n\n".join(parts) + "\n"


def _table(report: Report, wanted: Sequence[str]) -> str:
    columns = [metric for metric in wanted if any(metric in result.scores for result in report.results)]
    rows = []
    for result in report.results:
        rows.append(
            [_label(result), result.model, str(sum(map(len, result.images))), *_cells(result.estimates(), columns)]
        )
    for concept, change in report.retention().items():
        rows.append([concept, "merged − single", "", *_cells(change, columns, "+")])
    return _markdown_table(["concept", "model", "n", *(METRICS[metric] for metric in columns)], rows)


def _prompt_table(result: Result) -> str:
    columns = [metric for metric in MAIN if metric in result.scores]
    rows = [
        [prompt, *(f"{result.scores[metric][number].mean():.3f}" for metric in columns)]
        for number, prompt in enumerate(result.prompts)
    ]
    return f"{_label(result)}, {result.model}\n\n" + _markdown_table(["prompt", *(METRICS[m] for m in columns)], rows)


def _described(report: Report) -> str:
    lines = [f"- {key}: {_told(report.about[key])}" for key in _TOLD if report.about.get(key)]
    return "\n".join([*lines, "- means with bootstrap 95 % intervals over prompts and seeds"])


def _label(result: Result) -> str:
    others = [concept for concept in result.shown if concept != result.concept]
    return f"{result.concept} (with {', '.join(others)})" if others else result.concept


def _cells(estimates: Mapping[str, Estimate], columns: Iterable[str], sign: str = "") -> list[str]:
    found = (estimates.get(column) for column in columns)
    return ["–" if e is None else f"{e.mean:{sign}.3f} [{e.low:{sign}.3f}, {e.high:{sign}.3f}]" for e in found]


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", r"\|").replace("<", r"\<") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *escaped, strict=True)]
    lines = [head, ["-" * width for width in widths], *escaped]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _told(value: Any) -> str:
    """A JSON value on one line: hashes shortened, and of texts only how many there are."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items() if inner not in (None, ""))
    if isinstance(value, list):
        return str(len(value)) if any(isinstance(entry, str) for entry in value) else ", ".join(map(str, value))
    return value[:16] if isinstance(value, str) and _HASH.fullmatch(value) else str(value)
