"""What the model card's figures mean: which answers count as right, and the intervals."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.evaluation.judges.clip import Encoder
from tools.emoji import measure
from tools.emoji.compose import CANVAS, Plan

WORDS = ("owl", "red apple", "turtle", "3d", "drawing", "flat", "cartoon", "beach", "snow", "night", "white")


def bag_of_words(text: str) -> Tensor:
    return torch.tensor([float(word in text) for word in WORDS])


def encoder(seen: str, left: str = "", right: str = "") -> Encoder:
    """An encoder that reads the colour in an image's middle: red says `left`, blue says `right`, others say `seen`."""

    def read(image: Image.Image) -> Tensor:
        red, _, blue = image.getpixel((32, 32))  # pyright: ignore[reportGeneralTypeIssues]
        return bag_of_words(left if red > 200 else right if blue > 200 else seen)

    def embed_images(images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([read(image) for image in images])

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return torch.stack([bag_of_words(text) + 1e-3 for text in texts])

    return Encoder(id="words", weights="", embed_images=embed_images, embed_texts=embed_texts)


def plan(*subjects: str) -> Plan:
    return Plan(torch.zeros(3, CANVAS, CANVAS), (), "", subjects, "3d", "beach")


def two_sided() -> Image.Image:
    """Red on the left, blue on the right, black in between."""
    image = Image.new("RGB", (64, 64))
    image.paste("red", (0, 0, 28, 64))
    image.paste("blue", (36, 0, 64, 64))
    return image


NOUNS = ["red apple", "turtle", "owl"]


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        ("a 3d owl on the beach", (True, True, True)),
        ("a 3d turtle on the beach", (False, True, True)),
        ("a drawing of an owl in the snow", (True, False, False)),
    ],
)
def test_an_answer_is_right_when_the_right_word_is_nearest(seen: str, right: tuple[bool, bool, bool]) -> None:
    found = measure.Judgement(encoder(seen), NOUNS).of([plan("owl")], [Image.new("RGB", (64, 64))])
    assert (found["subject"], found["style"], found["place"]) == ([right[0]], [right[1]], [right[2]])


@pytest.mark.parametrize(
    ("left", "right", "both"),
    [("a 3d owl", "a 3d turtle", True), ("a 3d owl", "a 3d owl", False), ("a 3d turtle", "a 3d owl", False)],
)
def test_of_a_pair_each_is_looked_for_on_its_side(left: str, right: str, both: bool) -> None:
    judgement = measure.Judgement(encoder("a 3d owl and a turtle on the beach", left, right), NOUNS)
    found = judgement.of([plan("owl", "turtle")], [two_sided()])
    assert found == {"subject": [both], "style": [True], "place": [True]}


def test_share_gives_the_wilson_interval() -> None:
    found = measure.share([True] * 8 + [False] * 2)
    assert (found["share"], found["n"]) == (0.8, 10)
    assert found["low"] == pytest.approx(0.4902, abs=1e-3)  # tables of the Wilson score interval: 8 of 10
    assert found["high"] == pytest.approx(0.9433, abs=1e-3)


def test_recall_counts_both_directions() -> None:
    several = [replace(plan(noun), place=place) for noun, place in (("owl", "beach"), ("turtle", "snow"))]
    black = torch.zeros(3, CANVAS, CANVAS, dtype=torch.uint8)
    several = [replace(each, background=black) for each in several]
    found = measure.recall(encoder("a 3d owl on the beach"), several)
    assert (found["image to text R@1"], found["image to text R@5"]) == (0.5, 1.0)  # every image looks like the first
    assert found["text to image R@1"] == 1.0  # equal similarities: the tie is no loss
