"""Words: tokens, names, articles and class nouns in prompts, and the older names of keys in our files."""

import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any
from unicodedata import category, normalize

MAX_NAME = 100  # bytes; file systems allow 255, with endings
TOKEN = re.compile(r"(?<!>_)<(?=[^\s<>])[^<>]*(?<=[^\s<>])>(?!_<)")  # a tagger's <o>_<o> is none


def tokens_in(prompt: str) -> list[str]:
    """Return the tokens that a prompt names, such as "<dog>", in their order."""
    return TOKEN.findall(normalize("NFC", prompt))


def as_token(name: str, otherwise: str = "") -> str:
    """Return the token by which prompts can name something: `*` in cat.pt -> `<cat>`, `My Fox` -> `<my-fox>`.

    Args:
        name: what it is called elsewhere; a token already stays as it is.
        otherwise: its name where `name` contains no letters or digits.
    """
    name = normalize("NFC", name)
    return name if TOKEN.fullmatch(name) else f"<{slug(name) or slug(otherwise) or 'token'}>"


def command_line(*words: object) -> str:
    """Return a command of ours that can be pasted into a shell, in double quotes where they do."""
    return " ".join(["sbora-diffusion", *map(_quoted, map(str, words))])


def _quoted(word: str) -> str:
    if shlex.quote(word) == word or any(letter in word for letter in '"\\$`!'):
        return shlex.quote(word)
    return f'"{word}"'


def joined_names(names: Iterable[str]) -> str:
    """Return a name for several concepts, such as `cat+dog`; of many, the first one, a count and a digest."""
    listed = list(names)
    if len((joined := "+".join(listed)).encode()) <= MAX_NAME:
        return joined
    digest = hashlib.sha256(joined.encode()).hexdigest()[:8]
    shown = [listed[0][:40], f"{len(listed) - 1}-more", digest]
    return "+".join(shown)


def slug(text: str) -> str:
    """Return the letters, digits and underscores of a text, lower case, joined by hyphens: `My dog (2)` -> `my-dog-2`.

    Marks belong to their letters: vowel signs of Indic scripts, accents that have no letter of their own.
    """
    letters = normalize("NFC", text.lower())
    kept = (each if each.isalnum() or each == "_" or category(each)[0] == "M" else " " for each in letters)
    return "-".join("".join(kept).split())


# Written until November 2026 -> now: in concept files, checkpoints, recipes, run logs and results.
CURRENT = {
    "quiet_weight": "output_penalty",
    "final_rate": "final_learning_rate",
    "class_pictures": "class_images",
    "validation_pictures": "validation_images",
    "pictures": "images",
    "picture": "image",
    "as_loud": "match_response",
}


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with every older key under its current name."""
    return {CURRENT.get(key, key): value for key, value in values.items()}


def with_older_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with the older names of keys; the inverse of `with_current_names`."""
    older = {current: name for name, current in CURRENT.items()}
    return {older.get(key, key): value for key, value in values.items()}


def with_article(noun: str) -> str:
    """Return a noun with its article, by the first letter: `an owl`, but `a unicorn`."""
    return f"an {noun}" if noun[0].lower() in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def say_plainly(prompt: str, token: str, noun: str) -> str:
    """Replace a token by its class noun, with the right article: `a <octopus>` becomes `an octopus`."""
    article = with_article(noun).removesuffix(noun)
    prompt = re.sub(rf"\ba\s+{re.escape(token)}", article + noun, prompt)
    prompt = re.sub(rf"\bA\s+{re.escape(token)}", article.capitalize() + noun, prompt)
    return prompt.replace(token, noun)


def in_words(kind: type) -> str:
    """Return the name of a setting's type: `a whole number` for int."""
    return {int: "a whole number", float: "a number", str: "a text"}.get(kind, kind.__name__)


def parse_json(content: str | bytes) -> Any:
    """Parse JSON; whatever is wrong with it raises ValueError, deep nesting too."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; whatever is wrong with it raises ValueError, deep nesting too."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def printable(text: str) -> str:
    """Return a text with its control characters escaped: names in files may hold commands for a terminal."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text
    )
