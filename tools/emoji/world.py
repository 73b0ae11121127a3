"""What exists in emoji64's world (world.toml): subjects, styles, backgrounds, and how a caption names them."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from sbora_diffusion.utils.text import with_article


@dataclass(frozen=True)
class Subject:
    """A thing that can be pictured: `label` is emojibase's, `name` is the word in captions, `tier` opens it."""

    label: str
    name: str
    tier: int
    is_concept: bool


@dataclass(frozen=True)
class Judge:
    """What emoji-clip sees beyond the world's subjects, and what it must never see."""

    groups: tuple[int, ...]  # of emojibase
    skip_subgroups: tuple[int, ...]
    held_out: tuple[str, ...]
    siblings: dict[str, list[str]]  # concept -> emojibase labels of other individuals of its class


@dataclass(frozen=True)
class World:
    """The parsed world.toml; every mapping keeps the file's order."""

    styles: dict[str, str]
    colours: dict[str, tuple[int, int, int]]
    scenes: dict[str, str]
    subjects: tuple[Subject, ...]
    judge: Judge

    def held_out(self, subject: str, style: str) -> bool:
        """Whether this art must never enter pre-training (concept subjects in the Fluent styles)."""
        return style in ("3d", "flat") and any(s.name == subject and s.is_concept for s in self.subjects)


@cache
def load_world() -> World:
    """Read the packaged world.toml."""
    raw = tomllib.loads(files("tools.emoji").joinpath("world.toml").read_text())
    subjects = [_subject(entry, 0, True) for entry in raw["subjects"]["concepts"]]
    for tier, entries in enumerate(raw["subjects"]["tiers"]):
        subjects += [_subject(entry, tier, False) for entry in entries]
    colours = {name: tuple(rgb) for name, rgb in raw["colours"].items()}
    about = raw["judge"]
    judge = Judge(tuple(about["groups"]), tuple(about["skip_subgroups"]), tuple(about["held_out"]), about["siblings"])
    return World(raw["styles"], colours, raw["scenes"], tuple(subjects), judge)


def _subject(entry: str | dict[str, str], tier: int, is_concept: bool) -> Subject:
    label = entry if isinstance(entry, str) else entry["label"]
    name = label if isinstance(entry, str) else entry["name"]
    return Subject(label, name, tier, is_concept)


def caption(subjects: Sequence[str], style: str | None, place: str) -> str:
    """`["owl", "red apple"], "3d", "on the beach"` -> `a 3d owl and a red apple on the beach`."""
    first, *others = subjects
    if style is None:
        head = with_article(first)
    else:
        phrase = load_world().styles[style]
        head = "a " + phrase.format(with_article(first) if phrase.endswith("of {}") else first)
    return " and ".join([head, *map(with_article, others)]) + " " + place
