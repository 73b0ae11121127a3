"""Score images that anybody made: a folder of them, the prompts they were made from, and references."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sbora_diffusion.data.concept import EXTENSIONS
from sbora_diffusion.data.images import load_image
from sbora_diffusion.data.masks import is_mask
from sbora_diffusion.evaluation.encoders import Encoder, ImageEncoder
from sbora_diffusion.evaluation.results import Report, Result
from sbora_diffusion.evaluation.scores import Judge, instruct, score
from sbora_diffusion.evaluation.suite import load_suite
from sbora_diffusion.training.checkpoint import versions
from sbora_diffusion.utils.errors import SboraError

_NUMBERED = re.compile(r"(\d+)-(\d+)")


def score_folder(
    images: Path,
    prompts: str,
    references: Sequence[Path],
    class_nouns: Sequence[str],
    encoder: Encoder,
    vision: ImageEncoder | None = None,
) -> Report:
    """Score a folder of images.

    Args:
        images: JPEG, PNG or WebP files. Their names tell the prompt: "<number>-<seed>", the first prompt is 0.
        prompts: a suite, or a JSON file {"<image's name>": "<prompt in plain words>"} for images of any name.
        references: first a folder for each concept that is in every image, then others, that these may be mistaken
            for: without any there is no success rate.
        class_nouns: what stands for each concept in the texts of a suite; none for JSON and one concept.

    Raises:
        SboraError: no image, a damaged one, one without a prompt, too few folders of references.
    """
    files = _files(images)
    texts = _texts(files, prompts, class_nouns)
    num_shown = max(1, len(class_nouns))
    names = _names(references, num_shown)
    known = {name: [load_image(path) for path in _files(folder)] for name, folder in names.items()}
    judge = instruct(encoder, known, vision)
    shown = list(names)[:num_shown]
    about = {
        "suite": {"name": prompts, "prompts": sorted(set(texts))},
        "encoder": {"id": encoder.id, "weights": encoder.weights},
        "vision": {"id": vision.id, "weights": vision.weights} if vision else None,
        "references": {name: len(shots) for name, shots in known.items()},
        "versions": versions(),
    }
    return Report(
        title=f"{images} against {', '.join(shown)}, judged by {encoder.id}",
        about=about,
        results=tuple(_results(images.resolve().name, files, texts, judge, shown)),
        references={name: known[name] for name in shown},
    )


def _results(
    model: str, files: Sequence[Path], texts: Sequence[str], judge: Judge, shown: Sequence[str]
) -> Iterator[Result]:
    rows = _rows(texts)
    order = [number for row in rows for number in row]
    stream = (load_image(files[number]) for number in order)
    for concept, scores in score(stream, [texts[number] for number in order], judge, {}, shown).items():
        yield Result(
            model=model,
            concept=concept,
            shown=tuple(shown),
            prompts=tuple(texts[row[0]] for row in rows),
            images=tuple(tuple(files[number] for number in row) for row in rows),
            scores={metric: values.view(len(rows), -1) for metric, values in scores.items()},
        )


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SboraError(f"no folder {folder}")
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in EXTENSIONS and path.name[0] != "."]
    files = [path for path in found if not is_mask(path)]
    if not files:
        raise SboraError(f"no image in {folder}", f"allowed are {', '.join(EXTENSIONS)}")
    return files


def _names(folders: Sequence[Path], wanted: int) -> dict[str, Path]:
    """The folders by name; a concept's folder of images has the concept's."""
    folders = [path.parent if path.name == "images" else path for path in map(Path.resolve, folders)]
    names = {folder.name: folder / "images" if (folder / "images").is_dir() else folder for folder in folders}
    if len(names) < max(wanted, len(folders)):
        got = ", ".join(folder.name for folder in folders) or "none"
        raise SboraError(f"got the folders of references {got}, expected different ones, {wanted} at least")
    return names


def _texts(files: Sequence[Path], prompts: str, class_noun: Sequence[str]) -> list[str]:
    """For each image its prompt, with class nouns for concepts."""
    if prompts.endswith(".json") and Path(prompts).is_file():
        captions = _read_json(Path(prompts))
        if isinstance(captions, dict):  # a list is CustomConcept101's
            return [_caption(path, captions, prompts) for path in files]
    bound = load_suite(prompts).bind(class_noun)
    return [bound[_number(path, len(bound))] for path in files]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SboraError(f"cannot read {path}: {error}") from error


def _caption(path: Path, captions: dict[str, str], source: str) -> str:
    text = captions.get(path.name, captions.get(path.stem))
    if not isinstance(text, str):
        raise SboraError(f"{source} has no prompt for {path.name}", "name every image, with or without its extension")
    return text


def _number(path: Path, count: int) -> int:
    match = _NUMBERED.fullmatch(path.stem)
    if not match or int(match[1]) >= count:
        raise SboraError(
            f"the name {path.name} tells no prompt, expected one such as 000-0.png with a number from 0 to {count - 1}",
            "rename the images, or give --prompts a JSON file of image -> prompt",
        )
    return int(match[1])


def _rows(texts: Sequence[str]) -> list[list[int]]:
    """Images by prompt; if some prompts have more images than others, each image for itself."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        groups[text].append(number)
    rows = list(groups.values())
    return rows if len({len(row) for row in rows}) == 1 else [[number] for number in range(len(texts))]
