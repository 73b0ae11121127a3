"""An evaluation for people and programs: numbers (JSON), tables (Markdown), images with their scores (PNG)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sbora_diffusion.evaluation.gallery import read_image, write_image, write_text
from sbora_diffusion.evaluation.results import Estimate, Report, Result
from sbora_diffusion.evaluation.tables import to_markdown
from sbora_diffusion.inference.image_grid import sheet

_GRID_SEEDS = 4  # images of each model and prompt in a grid
_DIGITS = 6


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.json and a grid of images for each set of concepts; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "report.json"]
    write_text(to_markdown(report), written[0])
    write_text(to_json(report, folder), written[1])
    for shown in dict.fromkeys(result.shown for result in report.results):
        path = folder / f"grid-{'+'.join(shown)}.png"
        results = [result for result in report.results if result.shown == shown]
        write_image(grid(results, report.references), path)
        written.append(path)
    return written


def to_json(report: Report, root: Path) -> str:
    """Every number and all that is needed to get it again, keys sorted; images' paths as seen from `root`."""
    content = {
        "about": report.about,
        "results": [_result_to_dict(result, root) for result in report.results],
        "retention": {concept: _to_dict(change) for concept, change in report.retention().items()},
    }
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def grid(results: Sequence[Result], references: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """References on top, then a row a prompt: the first seeds' images of every model, with their scores.

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
    """Such as "text 0.71 image 0.85 hit"; of several concepts each one's image alignment and success."""
    images = []
    for result in results:
        hit = {None: "", 1.0: " hit", 0.0: " miss"}[_picked(result.scores.get("success"), number, column)]
        images.append(f"{result.scores['image'][number, column]:.2f}{hit}")
    return f"text {results[0].scores['text_mos'][number, column]:.2f} image {', '.join(images)}"


def _picked(values: Tensor | None, number: int, column: int) -> float | None:
    return None if values is None else float(values[number, column])


def _result_to_dict(result: Result, root: Path) -> dict[str, Any]:
    """Every number, and images' paths as seen from `root`, ready for JSON."""
    names = [[_relative(path, root) for path in row] for row in result.images]
    scores = {metric: values.tolist() for metric, values in result.scores.items()}
    prompts = [
        {
            "prompt": prompt,
            "mean": {metric: _rounded(values[number].mean().item()) for metric, values in result.scores.items()},
            "images": [
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
