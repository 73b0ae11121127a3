"""Every score of an image against numbers computed by hand, and who may be mistaken for whom."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.encoders import Encoder, ImageEncoder
from sbora_diffusion.evaluation.scores import METRICS, Judge, instruct, reference_images, score
from sbora_diffusion.utils.errors import SboraError

from .conftest import COLOURS

TOKENS = {"<rex>": "dog", "<tom>": "dog"}


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), COLOURS[colour])


def cosine(one: tuple[int, ...] | np.ndarray, other: tuple[int, ...] | np.ndarray) -> float:
    one, other = np.asarray(one, float), np.asarray(other, float)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


@pytest.fixture
def instructed(judge: Encoder, concepts: list[Concept]) -> Judge:
    return instruct(judge, reference_images(concepts), None)


def test_scores_of_one_image(instructed: Judge) -> None:
    scores = score([plain("red")], ["a green <rex>"], instructed, TOKENS, ["rex"])["rex"]
    red, green, dog, other = (np.array(c) for c in (COLOURS["red"], COLOURS["green"], COLOURS["dog"], (1, 1, 1)))
    expected = {
        "text_mos": 2.5 * cosine(red, 4 * other + green + dog),  # A photo depicts a
        "text_cd": 2.5 * cosine(red, other + green + dog),
        "text_cosine": cosine(red, other + green + dog),
        "image": (cosine(red, red) + cosine(red, red + 20)) / 2,
        "image_mos": (cosine(red, red) + cosine(red, red + 20)) / 2,
        "image_mos_first_reference": 1.0,
        "success": 1.0,
    }
    assert {metric: values.item() for metric, values in scores.items()} == pytest.approx(expected, abs=1e-6)
    assert list(scores) == [metric for metric in METRICS if metric != "vision"]


def test_success_means_ranked_first(instructed: Judge) -> None:
    images = [plain(colour) for colour in ("red", "blue", "green")]
    scores = score(images, ["a <rex>"] * 3, instructed, TOKENS, ["rex"])
    assert scores["rex"]["success"].tolist() == [1, 0, 0]


def test_concepts_of_one_image_do_not_compete(instructed: Judge) -> None:
    """What shows rex alone is a success for rex, and the green image for nobody."""
    purple = Image.new("RGB", (8, 8), (130, 50, 120))
    images = [purple, plain("red"), plain("green")]
    scores = score(images, ["a <rex> and a <tom>"] * 3, instructed, TOKENS, ["rex", "tom"])
    assert scores["rex"]["success"].tolist() == [1, 1, 0]
    assert scores["tom"]["success"].tolist() == [1, 0, 0]
    assert scores["rex"]["text_mos"].equal(scores["tom"]["text_mos"])
    assert not scores["rex"]["image"].equal(scores["tom"]["image"])


def test_no_success_without_others(judge: Encoder, concepts: list[Concept]) -> None:
    alone = instruct(judge, reference_images(concepts[:1]), None)
    assert "success" not in score([plain("blue")], ["a <rex>"], alone, TOKENS, ["rex"])["rex"]


def test_a_second_judge_of_images(judge: Encoder, concepts: list[Concept]) -> None:
    vision = ImageEncoder(id="v", weights="", embed_images=lambda images: judge.images(images).flip(1) ** 2)
    both = instruct(judge, reference_images(concepts), vision)
    scores = score([plain("blue")], ["a <rex>"], both, TOKENS, ["rex"])["rex"]
    blue, red = (np.array(COLOURS[name], float) for name in ("blue", "red"))
    assert scores["vision"].item() == pytest.approx(
        (cosine(blue**2, red**2) + cosine(blue**2, (red + 20) ** 2)) / 2, abs=1e-6
    )


def test_many_images_few_in_memory(instructed: Judge) -> None:
    """Images come one by one, and the scores of each are its own."""
    taken = []

    def stream() -> Iterator[Image.Image]:
        for number in range(70):
            taken.append(number)
            yield Image.new("RGB", (8, 8), (3 * number, 100, 50))

    prompts = [f"a {'red' if number % 2 else 'green'} <rex>" for number in range(70)]
    scores = score(stream(), prompts, instructed, TOKENS, ["rex"])["rex"]
    last = score([Image.new("RGB", (8, 8), (207, 100, 50))], prompts[-1:], instructed, TOKENS, ["rex"])["rex"]
    assert taken == list(range(70))
    for metric, values in scores.items():
        assert values.shape == (70,)
        assert values[-1].item() == pytest.approx(last[metric].item(), abs=1e-6)


def test_what_cannot_be_scored(judge: Encoder, instructed: Judge) -> None:
    with pytest.raises(SboraError, match="got 1 images and 2 prompts"):
        score([plain("red")], ["a <rex>", "a <rex>"], instructed, TOKENS, ["rex"])
    with pytest.raises(SboraError, match="got 0 images and 0 prompts"):
        score([], [], instructed, TOKENS, ["rex"])
    with pytest.raises(SboraError, match="the concept rex has no reference images"):
        instruct(judge, {"rex": []}, None)
