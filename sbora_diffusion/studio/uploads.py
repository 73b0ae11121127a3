"""What the Train tab teaches: a concept's folder made of dropped images, and how far its training is."""

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sbora_diffusion.data.concept import EXTENSIONS, Concept, load_concept
from sbora_diffusion.training.checkpoint import read_log
from sbora_diffusion.utils.errors import SboraError

MAX_IMAGES = 50
MAX_PIXELS = 8192 * 8192
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
RECENT = 30  # steps whose times the estimate is made from


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training is, as its log tells."""

    step: int = 0
    steps: int = 0
    losses: tuple[tuple[int, float], ...] = ()  # (step, loss)
    seconds_left: float | None = None
    image: Path | None = None  # the latest preview, at the end the sheet of before and after


def progress(run: Path) -> Progress:
    """Read a run folder."""
    entries = read_log(run)
    if not entries:
        return Progress()
    last = entries[-1]
    images = [run / entry["image"] for entry in entries if entry.get("image")]
    recent = entries[-RECENT:]
    pace = (recent[-1]["time"] - recent[0]["time"]) / max(1, len(recent) - 1)
    left = pace * (last["steps"] - last["step"]) - (time.time() - last["time"])
    return Progress(
        step=last["step"],
        steps=last["steps"],
        losses=tuple((entry["step"], entry["loss"]) for entry in entries),
        seconds_left=max(0.0, left) if len(recent) > 1 else None,
        image=next((path for path in reversed(images) if path.is_file()), None),
    )


def smoothed(losses: Sequence[tuple[int, float]], weight: float = 0.95) -> list[tuple[int, float]]:
    """An exponential mean without the bias of its beginning: single steps say little, their timesteps differ so."""
    total, norm, means = 0.0, 0.0, []
    for step, loss in losses:
        total, norm = weight * total + (1 - weight) * loss, weight * norm + (1 - weight)
        means.append((step, total / norm))
    return means


def write_concept(root: Path, name: str, noun: str, images: Sequence[tuple[Path, str]]) -> Concept:
    """Make a concept's folder of images and their captions, whole or not at all.

    Args:
        root: the folder of concept folders.
        images: files and captions; a caption must say `<name>`, an empty one is made from the noun.

    Raises:
        SboraError: a name, noun, image or caption that will not do, or another concept of this name.
    """
    check_name(name)
    if not re.search(r"[^\W\d_]", noun):
        raise SboraError("there is no class", "Say what kind of thing it is in a word the model knows, such as: dog")
    if not 1 <= len(images) <= MAX_IMAGES:
        raise SboraError(f"got {len(images)} images, expected 1 to {MAX_IMAGES}", "Drop some; five are enough.")
    folder, partial = root / name, root / f".{name}.partial"
    if folder.exists():
        raise SboraError(f"there is a concept {name} already", "Choose another name.")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    try:
        captions = {}
        for number, (path, caption) in enumerate(images, 1):
            _check_image(path)
            file = f"{number:02d}{path.suffix.lower()}"
            shutil.copyfile(path, partial / "images" / file)
            captions[file] = " ".join(caption.split()) or f"a <{name}>"
        (partial / "concept.toml").write_text(_toml(name, noun.strip(), captions), encoding="utf-8")
        load_concept(str(partial), ())  # refuses what training would
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_concept(name, (root,))


def caption_lines(captions: str, files: Sequence[str], before: Sequence[str], said: str, token: str) -> list[str]:
    """A line for each of `files`: what was written of it stays, under the new token; what is missing is made.

    Args:
        captions: of the files `before`, a line each; those beyond them are for files that are new.
        said: the token in them.
    """
    lines = [line.replace(said, token) for line in captions.splitlines()]
    written: dict[str, list[str]] = {file: [] for file in [*before, *files]}  # a file may be there twice
    for file, line in zip(before, lines, strict=False):
        written[file].append(line)
    spare = iter(lines[len(before) :])
    return [written[file].pop(0) if written[file] else next(spare, f"a {token}") for file in files]


def check_name(name: str) -> None:
    """SboraError unless it can name a file and a token."""
    if not NAME.fullmatch(name):
        raise SboraError(f"got the name {name!r}", "Use small letters, digits and -, at most 40, such as: my-mug")


def _check_image(path: Path) -> None:
    try:
        with Image.open(path, formats=["JPEG", "PNG", "WEBP"]) as image:
            size = image.size
            if size[0] * size[1] <= MAX_PIXELS and path.suffix.lower() in EXTENSIONS:
                image.load()
                return
    except Exception:  # decoders of damaged files raise all kinds
        raise SboraError(f"{path.name} cannot be read", "Drop JPG, PNG or WebP images.") from None
    raise SboraError(
        f"{path.name} is {size[0]} × {size[1]} pixels, or of another kind", "Drop smaller JPG, PNG or WebP."
    )


def _toml(name: str, noun: str, captions: dict[str, str]) -> str:
    lines = [f"name = {_quoted(name)}", f"class_noun = {_quoted(noun)}", "", "[captions]"]
    lines += [f"{_quoted(file)} = {_quoted(caption)}" for file, caption in captions.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A JSON string is a TOML string too."""
    return json.dumps(text, ensure_ascii=False)
