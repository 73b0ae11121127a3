"""A concept to learn: a folder of images, the token that will name it, and a caption for each image."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unicodedata import normalize

from sbora_diffusion.data.folder import captions_beside, image_files, shared_captions
from sbora_diffusion.utils.errors import SboraError, guess
from sbora_diffusion.utils.files import read_bytes
from sbora_diffusion.utils.text import parse_toml, slug

log = logging.getLogger(__name__)

TEMPLATE = "a photo of a {token}"


@dataclass(frozen=True, kw_only=True)
class ConceptImage:
    """An image and what it shows, in words that contain the concept's token."""

    path: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Something to learn; its token is a new word for one particular `class_noun`."""

    name: str
    token: str
    class_noun: str
    images: tuple[ConceptImage, ...]


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The contents of a concept.toml; None: not given. `source` says where the images are from and is not read."""

    name: str | None = None
    token: str | None = None
    class_noun: str | None = None
    template: str = TEMPLATE
    captions: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def default_roots() -> tuple[Path, ...]:
    """Return the folders where concepts are looked up by name: ./concepts, then the package's or the checkout's."""
    package = Path(__file__).parents[1]
    packaged = package / "concepts"
    return Path("concepts"), packaged if packaged.is_dir() else package.parent / "concepts"


def known_concepts(roots: Sequence[Path]) -> list[str]:
    """List the folders with a concept.toml in the roots, by name."""
    return sorted({path.parent.name for root in roots for path in root.glob("*/concept.toml")})


def load_concept(
    name_or_folder: str | Path, roots: Sequence[Path] | None = None, class_noun: str | None = None
) -> Concept:
    """Find a concept by name in `roots`, else by the path of its folder, and check all but the images' contents.

    A folder without concept.toml needs only images: the folder's name becomes the concept's. An image's caption is
    its line under [captions] in concept.toml, else a .txt file of the same name beside it, else the template; `{token}`
    in them stands for the token.

    Args:
        name_or_folder: such as "dog", or "./photos/my dog"; a bare name means a concept of the roots first.
        roots: folders of concept folders; None for `default_roots`.
        class_noun: what kind of thing it is; overrides the folder's own.

    Raises:
        SboraError: nothing of that name, no image, or anything in concept.toml or the captions that is not right.
    """
    folder = _find(str(name_or_folder), default_roots() if roots is None else roots)
    described = _describe(folder / "concept.toml")
    name = concept_name(described.name or folder.resolve().name)
    token = normalize("NFC", described.token or f"<{name}>")
    noun = class_noun or described.class_noun or _noun(folder)
    if not name or not noun:
        missing = "class noun" if name else "name"
        raise SboraError(f"the folder {folder} suggests no {missing}", "give it in the folder's concept.toml")
    if (token[:1], token[-1:], token[1:-1].lower()) != ("<", ">", slug(token)):
        raise SboraError(
            f"the token of {folder} is {token!r}; allowed is one word of letters, digits, - and _ in angle brackets",
            f'write token = "<{name}>" in its concept.toml',
        )
    paths = image_files(folder)
    captions = [normalize("NFC", words).replace("{token}", token) for words in _captions(folder, paths, described)]
    images = [ConceptImage(path=path, caption=words) for path, words in zip(paths, captions, strict=True)]
    for image in images:
        if token not in image.caption:
            raise SboraError(
                f"the caption of {image.path} lacks the token {token}: {image.caption!r}",
                f"write {token} where the caption names the {noun}",
            )
    return Concept(name=name, token=token, class_noun=noun, images=tuple(images))


def _find(name_or_folder: str, roots: Sequence[Path]) -> Path:
    given = Path(name_or_folder)
    is_name = given.name == name_or_folder and bool(name_or_folder.strip("."))
    candidates = [root / given for root in roots] if is_name else []
    found = next((path for path in [*candidates, given] if path.is_dir()), None)
    if found and name_or_folder:
        if found != given and given.is_dir() and found.resolve() != given.resolve():
            log.warning("there is a folder %s, too; for that one: --concept ./%s", given, given)
        return found
    if given.is_file():
        raise SboraError(f"{name_or_folder} is no folder", "give the folder that holds the images")
    known = known_concepts(roots)
    known_names = f"known concepts: {', '.join(known)}" if known else "no concepts are installed"
    raise SboraError(
        f"no concept and no folder {name_or_folder!r}; {known_names}",
        f"{guess(name_or_folder, known)}or give the path of an image folder",
    )


def _describe(path: Path) -> _Description:
    """Read a concept.toml; an empty description where there is none."""
    try:
        table = parse_toml(read_bytes(path).decode("utf-8-sig"))
    except FileNotFoundError:
        return _Description()
    except (OSError, ValueError) as error:
        raise SboraError(f"cannot read {path}: {error}") from error
    allowed = [entry.name for entry in fields(_Description)]
    for key, value in table.items():
        if key not in allowed:
            raise SboraError(f"unknown key {key!r} in {path}; allowed: {', '.join(allowed)}")
        if key in ("captions", "source"):
            if not isinstance(value, dict):
                raise SboraError(f"{key} in {path} must be a table, got {value!r}")
        elif not isinstance(value, str) or not value.strip():
            raise SboraError(f"{key} in {path} must be a string that is not empty, got {value!r}")
    return _Description(**table)


def concept_name(text: str) -> str:
    """`My dog (2)` -> `my-dog-2`: usable in a token and as a file's name."""
    return slug(text)


def _noun(folder: Path) -> str:
    """The words of a folder's name without digits: `red_teapot2` -> `red teapot`."""
    return re.sub(r"[\d_-]+", " ", slug(folder.resolve().name)).strip()


def _captions(folder: Path, images: Sequence[Path], described: _Description) -> list[str]:
    """Return each image's caption: of concept.toml, else of a file beside the image, else the template."""
    written = {}
    for file, words in described.captions.items():
        if not isinstance(words, str):
            raise SboraError(f"the caption of {file} in {folder / 'concept.toml'} must be a string, got {words!r}")
        written[normalize("NFC", file)] = words
    names = {normalize("NFC", path.name): path for path in images}
    if unknown := [file for file in written if file not in names]:
        raise SboraError(f"{folder / 'concept.toml'} has a caption for {unknown[0]}, but there is no such image")
    others = [path for name, path in names.items() if name not in written]
    if shared := shared_captions(others):
        raise SboraError(f"2 images share the caption file {shared}", "rename one of the images")
    beside = captions_beside(others)
    return [written.get(name, beside.get(path, described.template)) for name, path in names.items()]
