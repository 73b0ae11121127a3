"""Tabulate accuracies of language models as the published tables do: methods by tasks, and the mean."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sbora_diffusion.evaluation.metrics.bootstrap import bootstrap_interval
from sbora_diffusion.llm.evaluate import TaskScores

NAMES = {"lora": "LoRA", "dora": "DoRA", "sbora-fa": "SBoRA-FA", "sbora-fb": "SBoRA-FB"}
_NOT_IN_LABEL = ("seed", "basis_seed")  # runs that differ only in these share a row


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Scores of one model."""

    source: str  # the adapter; "" for the base model
    about: Mapping[str, Any]  # method, quantize, data, parameters, config
    scores: Mapping[str, TaskScores]

    @property
    def label(self) -> str:
        if not self.source:
            return "base"
        name = NAMES.get(self.about.get("method", ""), self.source)
        quantised = "Q" if self.about.get("quantize", "none") != "none" else ""
        rank = self.about.get("config", {}).get("rank")
        return f"{quantised}{name}" + (f" r={rank}" if rank else "")

    @property
    def row(self) -> str:
        """Key of the row, equal for runs that differ only in their seed."""
        config = {key: value for key, value in self.about.get("config", {}).items() if key not in _NOT_IN_LABEL}
        data = self.about.get("data_sha256") or self.about.get("data")
        return str((self.label, data, sorted(config.items(), key=str)))


def accuracy_table(measured: Sequence[Measured]) -> str:
    """Return Markdown: per cent, with bootstrap 95 % intervals over questions and, if there are several, seeds.

    Args:
        measured: models with the same tasks.
    """
    tasks = list(measured[0].scores)
    rows = defaultdict(list)
    for one in measured:
        rows[one.row].append(one)
    has_failures = any(score.failed for one in measured for score in one.scores.values())
    titles = [task.removeprefix("adapters_") for task in tasks]
    head = ["model", "parameters", "seeds", *titles, "mean", *(["no answer found"] if has_failures else [])]
    lines = [_line(head), _line(["---"] * len(head))]
    names = _names(list(rows.values()))
    for name, runs in zip(names, rows.values(), strict=True):
        cells = [_cell(runs, task) for task in tasks]
        mean = sum(_mean(runs, task) for task in tasks) / len(tasks)
        failures = [_failures(runs)] if has_failures else []
        lines.append(_line([name, _parameters(runs[0]), str(len(runs)), *cells, f"{mean:.1%}", *failures]))
    return "\n".join(lines)


def to_json(measured: Measured) -> dict[str, Any]:
    """Return the entry of a model in the results file."""
    return {
        "adapter": measured.source,
        "label": measured.label,
        "about": dict(measured.about),
        "tasks": {
            task: {
                "metric": scores.metric,
                "score": scores.score,
                "failure_rate": scores.failure_rate,
                "questions": len(scores.correct),
                "correct": scores.correct,
            }
            for task, scores in measured.scores.items()
        },
    }


def _names(rows: Sequence[Sequence[Measured]]) -> list[str]:
    """Return the rows' labels, with their runs if two rows have the same label."""
    labels = Counter(runs[0].label for runs in rows)
    full = [f"{runs[0].label} ({', '.join(run.source for run in runs)})" for runs in rows]
    return [runs[0].label if labels[runs[0].label] == 1 else name for runs, name in zip(rows, full, strict=True)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _parameters(one: Measured) -> str:
    number = one.about.get("parameters")
    return f"{number:,}" if number else ""


def _mean(runs: Sequence[Measured], task: str) -> float:
    return sum(run.scores[task].score for run in runs) / len(runs)


def _cell(runs: Sequence[Measured], task: str) -> str:
    low, high = bootstrap_interval(torch.tensor([run.scores[task].correct for run in runs]))
    return f"{_mean(runs, task):.1%} [{low:.1%}, {high:.1%}]"


def _failures(runs: Sequence[Measured]) -> str:
    failed = [value for run in runs for scores in run.scores.values() for value in scores.failed]
    return f"{sum(failed) / len(failed):.1%}" if failed else ""
