"""The little English that prompts and messages need: nouns with articles and in the place of tokens, kinds."""

import re


def with_article(noun: str) -> str:
    """`owl` -> `an owl`, by the first letter, but `a unicorn`."""
    return f"an {noun}" if noun[0].lower() in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def say_plainly(prompt: str, token: str, noun: str) -> str:
    """`a <octopus> in the snow` -> `an octopus in the snow`: the class noun for a token, with the article it needs."""
    article = with_article(noun).removesuffix(noun)
    prompt = re.sub(rf"\ba\s+{re.escape(token)}", article + noun, prompt)
    prompt = re.sub(rf"\bA\s+{re.escape(token)}", article.capitalize() + noun, prompt)
    return prompt.replace(token, noun)


def in_words(kind: type) -> str:
    """What a setting is to be: int -> `a whole number`."""
    return {int: "a whole number", float: "a number", str: "a text"}.get(kind, kind.__name__)
