"""An evaluation for people and programs: numbers (JSON), tables (Markdown), pictures with their scores (PNG)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sbora_diffusion.diffusion.sheet import sheet
from sbora_diffusion.evaluation.gallery import read_picture, write_picture, write_text
from sbora_diffusion.evaluation.results import Estimate, Report, Result
from sbora_diffusion.evaluation.scores import METRICS

MAIN = ("text_mos", "text_cd", "image", "vision", "success")  # what the summary shows; image alignment never alone
_GRID_SEEDS = 4  # pictures of each model and prompt in a grid
_DIGITS = 6


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.json and a grid of pictures for each set of concepts; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "report.json"]
    write_text(to_markdown(report), written[0])
    write_text(to_json(report, folder), written[1])
    for shown in dict.fromkeys(result.shown for result in report.results):
        path = folder / f"grid-{'+'.join(shown)}.png"
        results = [result for result in report.results if result.shown == shown]
        write_picture(grid(results, report.references), path)
        written.append(path)
    return written


def to_json(report: Report, root: Path) -> str:
    """Every number and all that is needed to get it again, keys sorted; pictures' paths as seen from `root`."""
    content = {
        "about": report.about,
        "results": [_result_to_dict(result, root) for result in report.results],
        "retention": {concept: _to_dict(change) for concept, change in report.retention().items()},
    }
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def summary(report: Report) -> str:
    """A Markdown table of the main scores, a line for each result and each change."""
    return _table(report, MAIN)


def to_markdown(report: Report) -> str:
    """All tables."""
    parts = [f"# {report.title}", _described(report), summary(report)]
    parts += ["## All scores", _table(report, tuple(METRICS)), "## Each prompt"]
    parts += [_prompt_table(result) for result in report.results]
    return "\n\n".join(parts) + "\n"


def grid(results: Sequence[Result], references: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """References on top, then a row a prompt: the first seeds' pictures of every model, with their scores.

    Args:
        results: of the same prompts and shown concepts.
    """
    first = results[0]
    models = list(dict.fromkeys(result.model for result in results))
    rows = [("references", [(c, picture) for c in first.shown for picture in references[c][:_GRID_SEEDS]])]
    for number, prompt in enumerate(first.prompts):
        cells = []
        for model in models:
            own = [result for result in results if result.model == model]
            for column, path in enumerate(own[0].pictures[number][:_GRID_SEEDS]):
                cells.append((_caption(own, number, column), read_picture(path)))
        rows.append((prompt if len(models) == 1 else f"{prompt}: {', then '.join(models)}", cells))
    return sheet(rows)


def _caption(results: Sequence[Result], number: int, column: int) -> str:
    """Such as "text 0.71 image 0.85 yes"; with several concepts, image and success of each by name."""
    parts = [f"text {results[0].scores['text_mos'][number, column]:.2f}"]
    for result in results:
        name = "image" if len(results) == 1 else result.concept
        hit = {None: "", 1.0: " yes", 0.0: " no"}[_picked(result.scores.get("success"), number, column)]
        parts.append(f"{name} {result.scores['image'][number, column]:.2f}{hit}")
    return " ".join(parts)


def _picked(values: Tensor | None, number: int, column: int) -> float | None:
    return None if values is None else float(values[number, column])


def _prompt_table(result: Result) -> str:
    columns = [metric for metric in MAIN if metric in result.scores]
    rows = [
        [prompt, *(f"{result.scores[metric][number].mean():.3f}" for metric in columns)]
        for number, prompt in enumerate(result.prompts)
    ]
    return f"{_label(result)}, {result.model}\n\n" + _markdown_table(["prompt", *(METRICS[m] for m in columns)], rows)


def _label(result: Result) -> str:
    others = [concept for concept in result.shown if concept != result.concept]
    return f"{result.concept} (with {', '.join(others)})" if others else result.concept


def _count(result: Result) -> int:
    return sum(map(len, result.pictures))


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
    """A JSON value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items() if inner not in (None, ""))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(report: Report, wanted: Sequence[str]) -> str:
    columns = [metric for metric in wanted if any(metric in result.scores for result in report.results)]
    rows = []
    for result in report.results:
        rows.append([_label(result), result.model, str(_count(result)), *_cells(result.estimates(), columns)])
    for concept, change in report.retention().items():
        rows.append([concept, "merged − single", "", *_cells(change, columns, "+")])
    return _markdown_table(["concept", "model", "n", *(METRICS[metric] for metric in columns)], rows)


def _described(report: Report) -> str:
    keys = ("encoder", "vision", "suite", "base", "sampling", "seeds")
    lines = [f"- {key}: {_told(report.about[key])}" for key in keys if report.about.get(key)]
    return "\n".join([*lines, "- means with bootstrap 95 % intervals over prompts and seeds"])


def _result_to_dict(result: Result, root: Path) -> dict[str, Any]:
    """Every number, and pictures' paths as seen from `root`, ready for JSON."""
    names = [[_relative(path, root) for path in row] for row in result.pictures]
    scores = {metric: values.tolist() for metric, values in result.scores.items()}
    prompts = [
        {
            "prompt": prompt,
            "mean": {metric: _rounded(values[number].mean().item()) for metric, values in result.scores.items()},
            "pictures": [
                {"file": name} | {metric: _rounded(values[number][column]) for metric, values in scores.items()}
                for column, name in enumerate(names[number])
            ],
        }
        for number, prompt in enumerate(result.prompts)
    ]
    return {
        "model": result.model,
        "concept": result.concept,
        "shown": list(result.shown),
        "n": sum(map(len, names)),
        "estimates": _to_dict(result.estimates()),
        "prompts": prompts,
    }


def _to_dict(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {metric: {key: _rounded(value) for key, value in vars(e).items()} for metric, e in estimates.items()}


def _rounded(value: float) -> float:
    return round(value, _DIGITS)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
