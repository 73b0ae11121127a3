"""Score a folder of images from anywhere, with their prompts and reference images."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from sbora_diffusion.data.folder import EXTENSIONS, without_masks
from sbora_diffusion.data.images import load_image
from sbora_diffusion.evaluation.images import ImageFiles
from sbora_diffusion.evaluation.judges.base import Judge, Scorer, prepare
from sbora_diffusion.evaluation.report import Report, Result
from sbora_diffusion.evaluation.suites import load_suite
from sbora_diffusion.training.checkpoint import versions
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_bytes
from sbora_diffusion.utils.text import parse_json

log = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(\d+)-(\d+)")


def score_folder(
    images: Path,
    prompts: str,
    references: Sequence[Path],
    class_nouns: Sequence[str],
    judges: Sequence[Judge],
) -> Report:
    """Score a folder of images.

    Args:
        images: JPEG, PNG or WebP files, named "<prompt's number>-<seed>" (counting from 0) or listed in `prompts`.
        prompts: a suite, or a JSON file {"<image's name>": "<prompt in plain words>"} for images of any name.
        references: first a folder for each concept that is in every image, then folders of other concepts, which the
            success rate needs.
        class_nouns: what replaces each concept in the prompts of a suite; none for JSON and one concept.

    Raises:
        SboraError: no image, a damaged one, one without a prompt, too few folders of references.
    """
    files = _files(images)
    texts = _texts(files, prompts, class_nouns)
    num_shown = max(1, len(class_nouns))
    names = _names(references, num_shown)
    known = {name: [load_image(path) for path in _files(folder)] for name, folder in names.items()}
    scorer = prepare(judges, known)
    shown = list(names)[:num_shown]
    about = {
        "suite": {"name": prompts, "prompts": sorted(set(texts))},
        **{judge.kind: {"id": judge.id, "weights": judge.weights} for judge in judges},
        "references": {name: len(references) for name, references in known.items()},
        "versions": versions(),
    }
    return Report(
        title=f"{images} against {', '.join(shown)}, judged by {judges[0].id}",
        about=about,
        metrics={key: metric for judge in judges for key, metric in judge.metrics.items()},
        results=tuple(_results(images.resolve().name, files, texts, scorer, shown)),
        references={name: known[name] for name in shown},
    )


def _results(
    model: str, files: Sequence[Path], texts: Sequence[str], scorer: Scorer, shown: Sequence[str]
) -> Iterator[Result]:
    rows = _rows(texts)
    order = [number for row in rows for number in row]
    images = ImageFiles([files[number] for number in order], load_image)
    for concept, scores in scorer(images, [texts[number] for number in order], {}, shown).items():
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
    files = without_masks(found)
    if not files:
        raise SboraError(f"no image in {folder}", f"allowed are {', '.join(EXTENSIONS)}")
    return files


def _names(folders: Sequence[Path], wanted: int) -> dict[str, Path]:
    """Return the folders by name; the folder "images" of a concept gets the concept's name."""
    folders = [path.parent if path.name == "images" else path for path in map(Path.resolve, folders)]
    names = {folder.name: folder / "images" if (folder / "images").is_dir() else folder for folder in folders}
    if len(names) < max(wanted, len(folders)):
        got = ", ".join(folder.name for folder in folders) or "none"
        raise SboraError(f"got the folders of references {got}, expected at least {wanted}, all different")
    return names


def _texts(files: Sequence[Path], prompts: str, class_noun: Sequence[str]) -> list[str]:
    """Return the prompt of each image, with class nouns for concepts."""
    if prompts.endswith(".json") and Path(prompts).is_file():
        captions = _read_json(Path(prompts))
        if isinstance(captions, dict):  # a list is CustomConcept101's
            return [_caption(path, captions, prompts) for path in files]
    bound = load_suite(prompts).bind(class_noun)
    numbers = [_number(path, len(bound)) for path in files]
    if missing := [text for number, text in enumerate(bound) if number not in numbers]:
        log.warning("no image of %d of %d prompts, such as %r", len(missing), len(bound), missing[0])
    return [bound[number] for number in numbers]


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path))
    except ValueError as error:
        raise SboraError(f"cannot read {path}: {error}") from error


def _caption(path: Path, captions: dict[str, str], source: str) -> str:
    captions = {normalize("NFC", key): text for key, text in captions.items()}
    text = captions.get(normalize("NFC", path.name), captions.get(normalize("NFC", path.stem)))
    if not isinstance(text, str):
        raise SboraError(f"{source} has no prompt for {path.name}", "list every image, with or without its extension")
    return text


def _number(path: Path, count: int) -> int:
    match = _NUMBERED.fullmatch(path.stem)
    if not match or int(match[1]) >= count:
        raise SboraError(
            f"got the image {path.name}, expected a name such as 000-0.png with a prompt from 0 to {count - 1}",
            "rename the images, or give --prompts a JSON file of image -> prompt",
        )
    return int(match[1])


def _rows(texts: Sequence[str]) -> list[list[int]]:
    """Return the images' numbers by prompt; if some prompts have more images than others, a row for each image."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        groups[text].append(number)
    rows = list(groups.values())
    return rows if len({len(row) for row in rows}) == 1 else [[number] for number in range(len(texts))]
