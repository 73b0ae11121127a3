"""Write an evaluation's report: tables (Markdown), scores (JSON), images with their scores (PNG)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sbora_diffusion.evaluation.gallery import read_image, write_image
from sbora_diffusion.evaluation.judges import clip, vision
from sbora_diffusion.evaluation.metrics.bootstrap import Estimate
from sbora_diffusion.evaluation.reports.results import Report, Result
from sbora_diffusion.evaluation.reports.tables import main_metrics, to_markdown
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.utils.files import write_file
from sbora_diffusion.utils.text import with_current_names

_GRID_SEEDS = 4  # images of each model and prompt in a grid
_DIGITS = 6


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.json and a grid of images for each set of concepts; return their paths."""
    written = [folder / "report.md", folder / "report.json"]
    write_file(written[0], to_markdown(report).encode(), overwrite=True)
    write_file(written[1], to_json(report, folder).encode(), overwrite=True)
    for shown in dict.fromkeys(result.shown for result in report.results):
        path = folder / f"grid-{'+'.join(shown)}.png"
        results = [result for result in report.results if result.shown == shown]
        write_image(grid(results, report.references), path)
        written.append(path)
    return written


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
    content = json.loads(path.read_bytes())
    results: list[dict[str, Any]] = content["results"]
    for prompt in (prompt for result in results for prompt in result["prompts"]):
        prompt |= with_current_names(prompt)
    usual = main_metrics(clip.METRICS | vision.METRICS)
    return results, content.get("metrics") or {key: metric.title for key, metric in usual.items()}


def grid(results: Sequence[Result], references: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Return an image grid: references on top, then a row for each prompt with every model's first images and scores.

    Args:
        results: of the same prompts and shown concepts.
    """
    first = results[0]
    models = list(dict.fromkeys(result.model for result in results))
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


def _result_to_dict(result: Result, root: Path) -> dict[str, Any]:
    names = [[_relative(path, root) for path in row] for row in result.images]
    scores = {metric: values.tolist() for metric, values in result.scores.items()}
    prompts = [
        {
            "prompt": prompt,
            "mean": {metric: round(values[n].mean().item(), _DIGITS) for metric, values in result.scores.items()},
            "images": [
                {"file": name} | {metric: round(values[n][column], _DIGITS) for metric, values in scores.items()}
                for column, name in enumerate(names[n])
            ],
        }
        for n, prompt in enumerate(result.prompts)
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
    return {metric: estimate.rounded(_DIGITS) for metric, estimate in estimates.items()}


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
