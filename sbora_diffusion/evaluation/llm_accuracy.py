"""Measure language-model adapters, and tabulate their accuracies as the published tables do."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion import __version__
from sbora_diffusion.evaluation.metrics import bootstrap_interval
from sbora_diffusion.llm.adapters import find_folder, load_adapter, read_about
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.evaluate import EvalConfig, Harness, TaskScores
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import check_writable, write_file

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


def measure(
    base: str, adapters: Sequence[str], harness: Harness, config: EvalConfig, quantize: str, limit: int | None
) -> Iterator[Measured]:
    """Yield the scores of each adapter, or of the base model if there are none.

    Raises:
        SboraError: what `load_base`, `load_adapter` and `Harness.run` raise, one adapter twice.
    """
    _check_different(adapters)
    abouts = {source: read_about(source) for source in adapters}  # errors before minutes of work
    model, tokenizer = load_base(base, getattr(torch, config.dtype), quantize)
    for source in adapters or [""]:
        adapted = load_adapter(model, source, "default").eval() if source else model
        scores = harness.run(adapted, tokenizer, config.batch_size, limit)
        yield Measured(source=source, about=abouts.get(source, {}), scores=scores)
        model = adapted.unload() if source else model


def check_new(path: Path, force: bool) -> None:
    """Raise SboraError if a results file exists and `force` is false, or cannot be written."""
    if path.exists() and not force:
        raise SboraError(f"{path} exists", "choose another --out, or overwrite it with --force")
    check_writable(path)


def write_results(path: Path, about: Mapping[str, Any], config: EvalConfig, measured: Sequence[Measured]) -> None:
    """Write all scores, how they were made, and the versions."""
    versions = {"sbora-diffusion": __version__, "torch": torch.__version__}
    results = {**about, "versions": versions, "dtype": f"torch.{config.dtype}", "models": [*map(to_json, measured)]}
    write_file(path, json.dumps(results, indent=1).encode(), overwrite=True)


def accuracy_table(measured: Sequence[Measured]) -> str:
    """Return Markdown for models with the same tasks: per cent, with bootstrap 95 % intervals over questions, seeds."""
    tasks = list(measured[0].scores)
    rows = defaultdict(list)
    for one in measured:
        rows[one.row].append(one)
    has_failures = any(score.failed for one in measured for score in one.scores.values())
    titles = [task.removeprefix("adapters_") for task in tasks]
    head = ["model", "parameters", "seeds", *titles, "mean", *(["no answer found"] if has_failures else [])]
    lines = [head, ["---"] * len(head)]
    labels = Counter(runs[0].label for runs in rows.values())
    for runs in rows.values():
        label, parameters = runs[0].label, runs[0].about.get("parameters")
        name = label if labels[label] == 1 else f"{label} ({', '.join(run.source for run in runs)})"
        mean = sum(_mean(runs, task) for task in tasks) / len(tasks)
        cells = [*(_cell(runs, task) for task in tasks), f"{mean:.1%}", *([_failures(runs)] if has_failures else [])]
        lines.append([name, f"{parameters:,}" if parameters else "", str(len(runs)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def _mean(runs: Sequence[Measured], task: str) -> float:
    return sum(run.scores[task].score for run in runs) / len(runs)


def _cell(runs: Sequence[Measured], task: str) -> str:
    low, high = bootstrap_interval(torch.tensor([run.scores[task].correct for run in runs]))
    return f"{_mean(runs, task):.1%} [{low:.1%}, {high:.1%}]"


def _failures(runs: Sequence[Measured]) -> str:
    failed = [value for run in runs for scores in run.scores.values() for value in scores.failed]
    return f"{sum(failed) / len(failed):.1%}" if failed else ""


def _check_different(adapters: Sequence[str]) -> None:
    """Raise SboraError if one adapter is given twice: it would count as two seeds."""
    named: dict[Path, str] = {}
    for source in adapters:
        place = (find_folder(source) or Path(source)).resolve()
        if place in named:
            raise SboraError(f"{named[place]} and {source} are one adapter", "name each --adapter once")
        named[place] = source
