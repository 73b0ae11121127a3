"""Articles, and class nouns in the place of tokens."""

import pytest

from sbora_diffusion.utils.text import say_plainly, with_article


@pytest.mark.parametrize("said", ["an ice cream", "a house", "a unicorn", "an Airedale", "a 3d owl"])
def test_with_article(said: str) -> None:
    assert with_article(said.split(" ", 1)[1]) == said


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a <x> on the beach", "an octopus on the beach"),
        ("A <x>, asleep", "An octopus, asleep"),
        ("a 3d <x> and a <x>", "a 3d octopus and an octopus"),
        ("extra <x>", "extra octopus"),
        ("the <x>'s hat", "the octopus's hat"),
        ("a <y>", "a <y>"),
    ],
)
def test_say_plainly(prompt: str, plain: str) -> None:
    assert say_plainly(prompt, "<x>", "octopus") == plain


def test_no_article_to_change() -> None:
    assert say_plainly("a <dog> in a box", "<dog>", "dog") == "a dog in a box"
