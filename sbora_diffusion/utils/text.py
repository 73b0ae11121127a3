"""English for prompts and messages: articles, class nouns for tokens, types in words."""

import re


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
