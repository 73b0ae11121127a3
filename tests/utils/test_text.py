"""Articles, and class nouns in the place of tokens."""

import shlex
from pathlib import Path

import pytest

from sbora_diffusion.utils.text import as_token, command_line, joined_names, say_plainly, tokens_in, with_article


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


WORDS = ["dog", "a <dog> on the beach", "my files/pets.safetensors", "it's", 'say "hi"', "$HOME", "a`b`", "back\\slash"]


@pytest.mark.parametrize("word", [*WORDS, "wow!", "*", "~", "", "été"])
def test_a_suggested_command_is_what_a_shell_reads(word: str) -> None:
    assert shlex.split(command_line("generate", word, "--adapter", Path("x"))) == [
        "sbora-diffusion", "generate", word, "--adapter", "x",
    ]  # fmt: skip


def test_prompts_stand_in_double_quotes() -> None:
    assert command_line("generate", "a <dog>") == 'sbora-diffusion generate "a <dog>"'


def test_names_of_many_are_short_and_differ() -> None:
    assert joined_names(["cat", "dog"]) == "cat+dog"
    many = [f"my-favourite-mug-{number:02d}" for number in range(30)]
    name = joined_names(many)
    assert name.startswith("my-favourite-mug-00+29-more+")
    assert len(joined_names(["कुत्ता" * 50, "犬" * 100]).encode()) < 240
    assert len({joined_names(many), joined_names(many[1:]), joined_names([*many[:29], "other"])}) == 3
    assert joined_names(iter(many)) == name


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("*", "<my-cat>"),
        ("", "<my-cat>"),
        ("<>", "<my-cat>"),
        ("fox", "<fox>"),
        ("My Fox v1.0", "<my-fox-v1-0>"),
        ("<Rex>", "<Rex>"),
        ("<red fox", "<red-fox>"),
        ("Re\u0301my", "<r\u00e9my>"),
        ("<a> <b>", "<a-b>"),
    ],
)
def test_names_become_tokens_that_prompts_can_name(name: str, token: str) -> None:
    assert as_token(name, "my cat") == token
    assert tokens_in(f"a {token} on the beach") == [token]


def test_a_token_of_nothing() -> None:
    assert as_token("*", "**") == "<token>"
