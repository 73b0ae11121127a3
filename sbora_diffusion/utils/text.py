"""Words in prompts and messages: tokens, names, articles, class nouns for tokens, types in words."""

import re
from unicodedata import category, normalize

TOKEN = re.compile(r"(?<!>_)<(?=[^\s<>])[^<>]*(?<=[^\s<>])>(?!_<)")  # a tagger's <o>_<o> is none


def tokens_in(prompt: str) -> list[str]:
    """Return the tokens that a prompt names, such as "<dog>", in their order."""
    return TOKEN.findall(normalize("NFC", prompt))


def slug(text: str) -> str:
    """Return the letters, digits and underscores of a text, lower case, joined by hyphens: `My dog (2)` -> `my-dog-2`.

    Marks belong to their letters: vowel signs of Indic scripts, accents that have no letter of their own.
    """
    letters = normalize("NFC", text.lower())
    kept = (each if each.isalnum() or each == "_" or category(each)[0] == "M" else " " for each in letters)
    return "-".join("".join(kept).split())


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
