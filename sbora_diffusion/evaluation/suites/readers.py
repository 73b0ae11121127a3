"""The layouts in which prompts come: our TOML, Mix-of-Show's, DreamBooth's and CustomConcept101's files."""

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sbora_diffusion.utils.errors import SboraError

Kind = Literal["character", "object", "joint"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Lines = list[tuple[str, Kind]]  # prompts as their files have them

DREAMBOOTH_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")  # which of DreamBooth's classes get its "live subject" prompts
_CHARACTERS = re.compile(r"character|pet|person|\b(cat|dog)\b")  # in names of files and concepts


def read_prompts(path: Path, entry: str) -> tuple[Path, Lines]:
    """Read prompts in any supported layout, chosen by the file's name.

    Args:
        path: a .toml, .txt or .json file, or a subject's folder beside or with DreamBooth's prompts_and_classes.txt.
        entry: which of several concepts in one file; "" if there is only one.

    Returns:
        The file that holds the prompts, and the prompts.
    """
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
        table = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
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
    lines = [line for line in _text(path).splitlines() if line.strip()]
    kind: Kind = "character" if _CHARACTERS.search(path.stem) else "object"
    if any("{1}" in line for line in lines):
        kind = "joint"
    return [(line, kind) for line in lines]


def _dreambooth_file(folder: Path) -> Path:
    candidates = [folder / DREAMBOOTH_FILE, folder.resolve().parent / DREAMBOOTH_FILE]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise SboraError(f"the folder {folder} has no {DREAMBOOTH_FILE} in it or beside it", "give a prompts file")
    return found


def _read_dreambooth(path: Path, subject: str) -> Lines:
    """Read DreamBooth's prompts for a subject; its token and class noun become one placeholder."""
    text = _text(path)
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
        for content in json.loads(_text(path)):
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
    if isinstance(content, dict):
        name = _folder_name(content)
        return name, content["prompt_filename"], "character" if _CHARACTERS.match(name) else "object"
    *concepts, last = content
    return "+".join(map(_folder_name, concepts)), last["prompt_filename_compose"], "joint"


def _folder_name(concept: dict[str, str]) -> str:
    return Path(concept["instance_data_dir"]).name


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")
