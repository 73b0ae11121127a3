"""An evaluation's results and its report: tables (Markdown), scores (JSON), images with their scores (PNG)."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sbora_diffusion.evaluation.images import read_image, write_image
from sbora_diffusion.evaluation.judges.base import Metric
from sbora_diffusion.evaluation.metrics import Estimate, format_estimate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_json, write_file
from sbora_diffusion.utils.text import with_current_names

_HASH = re.compile(r"[0-9a-f]{64}")
_GRID_SEEDS = 4  # images of each model and prompt in a grid
_DIGITS = 6


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """How well the images of one model show one concept.

    Attributes:
        model: "single": the concept's own adapter; "merged": a merge; "together": several adapters at once.
        shown: all concepts that the images are to show, this one among them.
        prompts: as they were given to the model.
        images: files by prompt and seed.
        scores: metric -> (prompts, seeds).
    """

    model: str
    concept: str
    shown: tuple[str, ...]
    prompts: tuple[str, ...]
    images: tuple[tuple[Path, ...], ...]
    scores: dict[str, Tensor]

    def estimates(self) -> dict[str, Estimate]:
        """Return the mean of each metric with its interval."""
        return {metric: Estimate.of(values) for metric, values in self.scores.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Results, and all that is needed to obtain them again.

    Attributes:
        about: adapters, suite, judges, sampling, versions and so on, in JSON values.
        metrics: what the judges score, in the order of tables.
        references: the reference images of the shown concepts.
        files: what was written: tables, JSON, image grids.
    """

    title: str
    about: dict[str, Any]
    metrics: Mapping[str, Metric]
    results: tuple[Result, ...]
    references: dict[str, list[Image.Image]]
    files: tuple[Path, ...] = ()

    def retention(self) -> dict[str, dict[str, Estimate]]:
        """Return merged minus single, prompt by prompt and seed by seed, for each concept evaluated in both ways."""
        single = {result.shown: result.scores for result in self.results if result.model == "single"}
        return {
            result.concept: {m: Estimate.of(after - single[result.shown][m]) for m, after in result.scores.items()}
            for result in self.results
            if result.model == "merged" and result.shown in single
        }


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.json and a grid of images for each set of concepts; return their paths."""
    written = [folder / "report.md", folder / "report.json"]
    write_file(written[0], to_markdown(report).encode(), overwrite=True)
    write_file(written[1], to_json(report, folder).encode(), overwrite=True)
    for shown in dict.fromkeys(result.shown for result in report.results):
        path = folder / f"grid-{'+'.join(shown)}.png"
        write_image(grid([result for result in report.results if result.shown == shown], report.references), path)
        written.append(path)
    return written


def summary(report: Report) -> str:
    """Return a Markdown table of the main scores, a row for each result and each difference."""
    return _table(report, main_metrics(report.metrics))


def to_markdown(report: Report) -> str:
    """Return all tables of a report."""
    parts = [f"# {report.title}", _conditions(report.about), summary(report)]
    parts += ["## All scores", _table(report, report.metrics), "## Each prompt"]
    parts += [_prompt_table(result, main_metrics(report.metrics)) for result in report.results]
    return "\n\n".join(parts) + "\n"


def main_metrics(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the metrics that a summary shows."""
    return {key: metric for key, metric in metrics.items() if metric.is_main}


def _aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in plain text."""
    escaped = [[cell.replace("|", r"\|").replace("<", r"\<") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *escaped, strict=True)]
    lines = [head, ["-" * width for width in widths], *escaped]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _table(report: Report, metrics: Mapping[str, Metric]) -> str:
    columns = [metric for metric in metrics if any(metric in result.scores for result in report.results)]
    rows = []
    for result in report.results:
        count = str(sum(map(len, result.images)))
        rows.append([_label(result), result.model, count, *_cells(result.estimates(), columns)])
    for concept, change in report.retention().items():
        rows.append([concept, "merged − single", "", *_cells(change, columns, "+")])
    return _aligned(["concept", "model", "n", *(metrics[metric].title for metric in columns)], rows)


def _cells(estimates: Mapping[str, Estimate], columns: Iterable[str], sign: str = "") -> list[str]:
    return [format_estimate(estimates[column], sign) if column in estimates else "–" for column in columns]


def _prompt_table(result: Result, metrics: Mapping[str, Metric]) -> str:
    columns = [metric for metric in metrics if metric in result.scores]
    means = zip(*(result.scores[metric].mean(1).tolist() for metric in columns), strict=True)
    rows = [[prompt, *(f"{x:.3f}" for x in row)] for prompt, row in zip(result.prompts, means, strict=True)]
    head = ["prompt", *(metrics[metric].title for metric in columns)]
    return f"{_label(result)}, {result.model}\n\n{_aligned(head, rows)}"


def _label(result: Result) -> str:
    others = [concept for concept in result.shown if concept != result.concept]
    return f"{result.concept} (with {', '.join(others)})" if others else result.concept


def _conditions(about: Mapping[str, Any]) -> str:
    judges = [key for key, value in about.items() if isinstance(value, Mapping) and "weights" in value]
    keys = ("adapters", "merged", "base", "suite", *judges, "sampling", "seeds", "command")
    lines = [f"- {key}: {_on_one_line(about[key])}" for key in keys if about.get(key)]
    return "\n".join([*lines, "- means with bootstrap 95 % intervals over prompts and seeds"])


def _on_one_line(value: Any) -> str:
    """Return a JSON value in one line: hashes shortened, and of texts only their number."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_on_one_line(inner)}" for key, inner in value.items() if inner not in (None, ""))
    if isinstance(value, list):
        return str(len(value)) if any(isinstance(entry, str) for entry in value) else ", ".join(map(str, value))
    return value[:16] if isinstance(value, str) and _HASH.fullmatch(value) else str(value)


def to_json(report: Report, root: Path) -> str:
    """Return all scores and all that is needed to obtain them again, keys sorted; images' paths relative to `root`."""
    content = {
        "about": report.about,
        "metrics": {key: metric.title for key, metric in main_metrics(report.metrics).items()},
        "results": [_result_to_dict(result, root) for result in report.results],
        "retention": {concept: _to_dict(change) for concept, change in report.retention().items()},
    }
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_report(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read the results of a report.json, also of earlier versions, and the titles of its main metrics."""
    content = read_json(path)
    try:
        results: list[dict[str, Any]] = content["results"]
        for prompt in (prompt for result in results for prompt in result["prompts"]):
            prompt |= with_current_names(prompt)
        titles = content.get("metrics")
    except (LookupError, TypeError, AttributeError) as error:
        raise SboraError(f"{path} is damaged ({error})", "evaluate again") from None
    if titles:
        return results, titles
    from sbora_diffusion.evaluation.judges import clip, vision

    return results, {key: metric.title for key, metric in main_metrics(clip.METRICS | vision.METRICS).items()}


def _result_to_dict(result: Result, root: Path) -> dict[str, Any]:
    scores = {metric: values.tolist() for metric, values in result.scores.items()}
    prompts = [
        {
            "prompt": prompt,
            "mean": {metric: round(values[n].mean().item(), _DIGITS) for metric, values in result.scores.items()},
            "images": [
                {"file": path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)}
                | {metric: round(values[n][column], _DIGITS) for metric, values in scores.items()}
                for column, path in enumerate(result.images[n])
            ],
        }
        for n, prompt in enumerate(result.prompts)
    ]
    return {
        "model": result.model,
        "concept": result.concept,
        "shown": list(result.shown),
        "n": sum(map(len, result.images)),
        "estimates": _to_dict(result.estimates()),
        "prompts": prompts,
    }


def _to_dict(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {metric: estimate.rounded(_DIGITS) for metric, estimate in estimates.items()}


def grid(results: Sequence[Result], references: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Return an image grid: references on top, then a row for each prompt with every model's first images and scores.

    Args:
        results: of the same prompts and shown concepts.
    """
    first, models = results[0], list(dict.fromkeys(result.model for result in results))
    each = max(1, _GRID_SEEDS // len(first.shown))
    order = "" if len(first.shown) == 1 else f"; scores below in the order {', '.join(first.shown)}"
    rows = [(f"references{order}", [(c, image) for c in first.shown for image in references[c][:each]])]
    for number, prompt in enumerate(first.prompts):
        cells = []
        for model in models:
            own = [result for result in results if result.model == model]
            for column, path in enumerate(own[0].images[number][:_GRID_SEEDS]):
                cells.append((_caption(own, number, column), read_image(path)))
        rows.append((prompt if len(models) == 1 else f"{prompt}: {', then '.join(models)}", cells))
    return sheet(rows, cell=96 + 64 * len(first.shown))  # wide enough for the captions


def _caption(results: Sequence[Result], number: int, column: int) -> str:
    """Return such as "text 0.71 image 0.85 hit"; of several concepts each one's image alignment and success."""
    first = {metric: values[number, column] for metric, values in results[0].scores.items()}
    if "image" not in first:  # a judge without references
        return " ".join(f"{metric} {value:.2f}" for metric, value in first.items())
    images = []
    for result in results:
        success = result.scores.get("success")
        hit = "" if success is None else " hit" if success[number, column] else " miss"
        images.append(f"{result.scores['image'][number, column]:.2f}{hit}")
    return f"text {first['text_mos']:.2f} image {', '.join(images)}"
