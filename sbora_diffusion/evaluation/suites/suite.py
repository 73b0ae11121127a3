"""A suite: the prompts on which a concept, or several concepts in one image, are evaluated."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from sbora_diffusion.evaluation.suites.readers import Kind, read_prompts
from sbora_diffusion.utils.errors import SboraError

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
    package = Path(__file__).parents[2]
    packaged = package / "suites"
    return packaged if packaged.is_dir() else package.parent / "eval" / "suites"


def known_suites() -> list[str]:
    """Return the names of the suites that come with the package, sorted."""
    return sorted(path.stem for path in default_suites().glob("*.toml"))


def load_suite(name_or_path: str) -> Suite:
    """Read a suite by its name, or from a file or folder in a layout that readers.py supports.

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
    source, lines = read_prompts(path, entry)
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
