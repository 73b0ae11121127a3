"""Concept folders made from uploaded images and their captions."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sbora_diffusion.data.concept import Concept, load_concept
from sbora_diffusion.data.folder import EXTENSIONS
from sbora_diffusion.utils.errors import SboraError

MAX_IMAGES = 50
MAX_PIXELS = 8192 * 8192
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def write_concept(root: Path, name: str, noun: str, images: Sequence[tuple[Path, str]]) -> Concept:
    """Create the folder of a concept, completely or not at all.

    Args:
        root: the folder of concept folders.
        images: files and captions; a caption must contain `<name>`, an empty one becomes `a <name>`.

    Raises:
        SboraError: an invalid name, noun, image or caption, or a concept of this name exists.
    """
    check_name(name)
    if not re.search(r"[^\W\d_]", noun):
        raise SboraError("the class noun is missing", "Enter a word that the model knows, for example: dog")
    if not 1 <= len(images) <= MAX_IMAGES:
        raise SboraError(f"got {len(images)} images, expected 1 to {MAX_IMAGES}", "Five are enough.")
    folder, partial = root / name, root / f".{name}.partial"
    if folder.exists():
        raise SboraError(f"the concept {name} already exists", "Choose another name.")
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
        load_concept(str(partial), ())  # refuses what training would refuse
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_concept(name, (root,))


def caption_lines(captions: str, files: Sequence[str], before: Sequence[str], old: str, token: str) -> list[str]:
    """Return a caption for each of `files`: an edited caption stays with its image, missing ones are `a TOKEN`.

    Args:
        captions: one line for each of the files `before`; further lines are for new files.
        old: the token in `captions`, which `token` replaces.
    """
    lines = [line.replace(old, token) for line in captions.splitlines()]
    written: dict[str, list[str]] = {file: [] for file in [*before, *files]}  # a file may occur twice
    for file, line in zip(before, lines, strict=False):
        written[file].append(line)
    spare = iter(lines[len(before) :])
    return [written[file].pop(0) if written[file] else next(spare, f"a {token}") for file in files]


def check_name(name: str) -> None:
    """SboraError unless the name can be used for a file and a token."""
    if not NAME.fullmatch(name):
        hint = "Use 1 to 40 lowercase letters, digits and hyphens, for example: my-mug"
        raise SboraError(f"got the name {name!r}", hint)


def _check_image(path: Path) -> None:
    try:
        with Image.open(path, formats=["JPEG", "PNG", "WEBP"]) as image:
            size = image.size
            if size[0] * size[1] <= MAX_PIXELS and path.suffix.lower() in EXTENSIONS:
                image.load()
                return
    except Exception:  # decoders raise all kinds of exceptions for damaged files
        raise SboraError(f"{path.name} cannot be read", "Use JPG, PNG or WebP images.") from None
    raise SboraError(
        f"got {path.name} with {size[0]} × {size[1]} pixels, expected a JPG, PNG or WebP image of at most 8192 × 8192",
        "Resize or convert it.",
    )


def _toml(name: str, noun: str, captions: dict[str, str]) -> str:
    lines = [f"name = {_quoted(name)}", f"class_noun = {_quoted(noun)}", "", "[captions]"]
    lines += [f"{_quoted(file)} = {_quoted(caption)}" for file, caption in captions.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a TOML string: every JSON string is one."""
    return json.dumps(text, ensure_ascii=False)
