"""Suites: the prompts on which a concept, or several concepts in one image, are evaluated."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_bytes
from sbora_diffusion.utils.text import parse_json, parse_toml

Kind = Literal["character", "object", "joint"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Lines = list[tuple[str, Kind]]  # prompts as their files have them

DREAMBOOTH_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")  # which of DreamBooth's classes get its "live subject" prompts
_CHARACTERS = re.compile(r"character|pet|person|\b(cat|dog)\b")  # in names of files and concepts


def _read_prompts(path: Path, entry: str) -> tuple[Path, Lines]:
    """Return the file that holds the prompts, and the prompts; `entry` is one of several concepts in one file."""
    if path.is_dir():
        path, entry = _dreambooth_file(path), entry or path.resolve().name
    try:
        if path.name == DREAMBOOTH_FILE:
            return path, _read_dreambooth(path, entry)
        if path.suffix == ".json":
            return _read_custom_concept(path, entry)
        if entry:
            raise SboraError(f"{path} holds one suite, got #{entry}", "leave out the part from # on")
        if path.suffix == ".toml":
            return path, _read_toml(path)
        if path.suffix == ".txt":
            return path, _read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SboraError(f"cannot read {path}: {error}", "save it as UTF-8 text") from error
    raise SboraError(f"cannot read {path} as a suite, expected a .toml, .txt or .json file or a DreamBooth folder")


def _read_toml(path: Path) -> Lines:
    """Read our own: `kind = "object"`, `prompts = ["a {} on the beach", …]`."""
    try:
        table = parse_toml(read_bytes(path).decode("utf-8-sig"))
    except ValueError as error:
        raise SboraError(f"cannot read {path}: {error}") from error
    unknown = sorted(table.keys() - {"kind", "prompts"})
    if unknown:
        raise SboraError(f"unknown key {unknown[0]!r} in {path}; allowed: kind, prompts")
    kind, prompts = table.get("kind"), table.get("prompts", [])
    if kind not in KINDS:
        raise SboraError(f"got kind = {kind!r} in {path}, expected one of {', '.join(KINDS)}")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise SboraError(f"prompts in {path} must be a list of texts")
    return [(prompt, kind) for prompt in prompts]


def _read_lines(path: Path) -> Lines:
    """Read Mix-of-Show's, a prompt per line with <TOK> for the concept, or CustomConcept101's with {}, {0} and {1}."""
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    kind: Kind = "character" if _CHARACTERS.search(path.stem) else "object"
    if any("{1}" in line for line in lines):
        kind = "joint"
    return [(line, kind) for line in lines]


def _dreambooth_file(folder: Path) -> Path:
    for path in (folder / DREAMBOOTH_FILE, folder.resolve().parent / DREAMBOOTH_FILE):
        if path.is_file():
            return path
    raise SboraError(f"the folder {folder} has no {DREAMBOOTH_FILE} in it or beside it", "give a prompts file")


def _read_dreambooth(path: Path, subject: str) -> Lines:
    """Read DreamBooth's prompts for a subject; its token and class noun become one placeholder."""
    text = path.read_text(encoding="utf-8-sig")
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    if subject not in classes:
        known = ", ".join(classes) or "none"
        raise SboraError(f"{path} has no subject {subject or 'without a name'!r}; it has: {known}", "add #SUBJECT")
    is_live = classes[subject] in LIVE_CLASSES
    heading, kind = ("Live Subject Prompts", "character") if is_live else ("Object Prompts", "object")
    section = re.search(rf"^{heading}$(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    prompts: list[str] = re.findall(r"^'(.+)'\.format", section[1] if section else "", re.MULTILINE)
    return [(prompt.replace("{0} {1}", "{}"), kind) for prompt in prompts]


def _read_custom_concept(path: Path, entry: str) -> tuple[Path, Lines]:
    """Read CustomConcept101's dataset.json, or dataset_multiconcept.json for several concepts in one image."""
    found: dict[str, tuple[Path, Kind]] = {}
    try:
        for content in parse_json(read_bytes(path).decode("utf-8-sig")):
            name, file, kind = _custom_entry(content)
            found[name] = path.parent / file, kind
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SboraError(f"{path} is not in CustomConcept101's layout ({type(error).__name__}: {error})") from error
    if entry not in found:
        got = f"no concept {entry!r}" if entry else f"{len(found)} concepts"
        raise SboraError(f"{path} has {got}; known: {', '.join(found)}", f"choose one: --suite {path}#NAME")
    file, kind = found[entry]
    return file, [(line, kind) for line, _ in _read_lines(file)]


def _custom_entry(content: dict[str, str] | Sequence[dict[str, Any]]) -> tuple[str, str, Kind]:
    """Return name, prompts file and kind of an entry: a concept, or a list of concepts and their prompts file."""
    *concepts, last = (content, content) if isinstance(content, dict) else content
    name = "+".join(Path(concept["instance_data_dir"]).name for concept in concepts)
    if isinstance(content, dict):
        return name, last["prompt_filename"], "character" if _CHARACTERS.match(name) else "object"
    return name, last["prompt_filename_compose"], "joint"


_ANGLE = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text in which "{0}" stands for the first concept's token, "{1}" for the second's, and so on."""

    text: str
    kind: Kind

    @classmethod
    def parse(cls, text: str, kind: Kind) -> "Prompt":
        """Parse a prompt: one concept is written "{}", "{0}" or "<TOK>", several are "{0}" and "{1}".

        Raises:
            SboraError: no placeholder, an unknown one, or a second concept in a prompt that is not joint.
        """
        single = " ".join(text.split()).replace("<TOK>", "{0}")
        words = single.replace("{}", "{0}") if single.count("{}") == 1 else single
        numbers = _placeholders(words, text)
        if not numbers:
            raise SboraError(f"the prompt {text!r} has no placeholder", "write {} for the concept")
        if kind != "joint" and numbers != {0}:
            raise SboraError(f"the {kind} prompt {text!r} names several concepts", 'set the kind to "joint"')
        return cls(text=words, kind=kind)

    @property
    def placeholders(self) -> set[int]:
        return _placeholders(self.text, self.text)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts for the same number of concepts; `sha256` is that of the file they came from."""

    name: str
    prompts: tuple[Prompt, ...]
    sha256: str

    def __post_init__(self) -> None:
        if not self.prompts:
            raise SboraError(f"the suite {self.name} has no prompts", "write one per line")
        if len({prompt.kind == "joint" for prompt in self.prompts}) > 1:
            raise SboraError(f"the suite {self.name} mixes joint prompts with others", "split it into two suites")
        numbers = set[int]().union(*(prompt.placeholders for prompt in self.prompts))
        if numbers != set(range(self.num_concepts)):
            raise SboraError(f"the prompts of the suite {self.name} have the placeholders {sorted(numbers)} only")

    @property
    def num_concepts(self) -> int:
        """Number of concepts that an image is to show; some published joint prompts name only one of them."""
        highest = max(number for prompt in self.prompts for number in prompt.placeholders)
        return max(highest + 1, 2 if self.prompts[0].kind == "joint" else 1)

    def bind(self, tokens: Sequence[str]) -> list[str]:
        """Return the prompts with the concepts' words filled in: learned tokens, or class nouns.

        Raises:
            SboraError: not as many words as concepts.
        """
        if len(tokens) != self.num_concepts:
            raise SboraError(
                f"the suite {self.name} needs {self.num_concepts} concepts in one image, "
                f"got {len(tokens)}: {', '.join(tokens) or 'none'}",
                f"give {self.num_concepts} concepts, or choose another suite",
            )
        return [prompt.text.format(*tokens) for prompt in self.prompts]


def default_suites() -> Path:
    """Return the folder of the suites that come with the package or the checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "suites"
    return packaged if packaged.is_dir() else package.parent / "eval" / "suites"


def known_suites() -> list[str]:
    """Return the names of the suites that come with the package, sorted."""
    return sorted(path.stem for path in default_suites().glob("*.toml"))


def load_suite(name_or_path: str) -> Suite:
    """Read a suite by its name, or from a file or folder in one of the supported layouts.

    Args:
        name_or_path: such as "emoji64", "mine.toml", "test_pet.txt" (Mix-of-Show), "dreambooth/dog" (a folder of its
            data set), "dataset.json#pet_cat1" (CustomConcept101; after # a concept, or several joined by +).

    Raises:
        SboraError: nothing of that name, no prompts, an invalid prompt, an unknown layout.
    """
    if name_or_path in known_suites():
        name, path, entry = name_or_path, default_suites() / f"{name_or_path}.toml", ""
    else:
        file, _, entry = name_or_path.partition("#")
        path = Path(file)
        name = f"{path.stem}#{entry}" if entry else path.stem
    if not name_or_path or not path.exists():
        raise SboraError(f"no suite and no file {name_or_path!r}; known suites: {', '.join(known_suites())}")
    source, lines = _read_prompts(path, entry)
    try:
        prompts = tuple(Prompt.parse(text, kind) for text, kind in lines)
    except SboraError as defect:
        raise SboraError(f"{source}: {defect}", defect.hint) from None
    return Suite(name=name, prompts=prompts, sha256=hashlib.sha256(source.read_bytes()).hexdigest())


def _placeholders(text: str, original: str) -> set[int]:
    """Return the numbers in braces."""
    try:
        parts = [(field, any(rest)) for _, field, *rest in Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise SboraError(
            f"the prompt {original!r} cannot be read: {error}", "double the braces that are part of the text"
        ) from None
    odd = [f"{{{field}}}" for field, is_formatted in parts if is_formatted or not field.isdecimal()]
    odd += _ANGLE.findall(text)
    if odd:
        raise SboraError(
            f"unknown placeholder {odd[0]} in the prompt {original!r}",
            "allowed are {} or <TOK> for one concept, {0} and {1} for two",
        )
    return {int(field) for field, _ in parts}
