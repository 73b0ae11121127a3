"""Every score of an image against one computed by hand, and which concepts an image may be mistaken for."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.images import ImageFiles, reference_images
from sbora_diffusion.evaluation.judges.base import Metric, References, Scorer, prepare
from sbora_diffusion.evaluation.judges.clip import METRICS, Encoder
from sbora_diffusion.evaluation.judges.vision import ImageEncoder
from sbora_diffusion.utils.errors import SboraError

from ..conftest import COLOURS

TOKENS = {"<rex>": "dog", "<tom>": "dog"}


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), COLOURS[colour])


def cosine(one: tuple[int, ...] | np.ndarray, other: tuple[int, ...] | np.ndarray) -> float:
    one, other = np.asarray(one, float), np.asarray(other, float)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


@pytest.fixture
def score(judge: Encoder, concepts: list[Concept]) -> Scorer:
    return prepare([judge], reference_images(concepts))


def test_scores_of_one_image(score: Scorer) -> None:
    scores = score([plain("red")], ["a green <rex>"], TOKENS, ["rex"])["rex"]
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
    assert list(scores) == list(METRICS)


def test_success_means_ranked_first(score: Scorer) -> None:
    images = [plain(colour) for colour in ("red", "blue", "green")]
    scores = score(images, ["a <rex>"] * 3, TOKENS, ["rex"])
    assert scores["rex"]["success"].tolist() == [1, 0, 0]


def test_concepts_of_one_image_do_not_compete(score: Scorer) -> None:
    """What shows rex alone is a success for rex, and the green image for nobody."""
    purple = Image.new("RGB", (8, 8), (130, 50, 120))
    images = [purple, plain("red"), plain("green")]
    scores = score(images, ["a <rex> and a <tom>"] * 3, TOKENS, ["rex", "tom"])
    assert scores["rex"]["success"].tolist() == [1, 1, 0]
    assert scores["tom"]["success"].tolist() == [1, 0, 0]
    assert scores["rex"]["text_mos"].equal(scores["tom"]["text_mos"])
    assert not scores["rex"]["image"].equal(scores["tom"]["image"])


def test_no_success_without_others(judge: Encoder, concepts: list[Concept]) -> None:
    alone = prepare([judge], reference_images(concepts[:1]))
    assert "success" not in alone([plain("blue")], ["a <rex>"], TOKENS, ["rex"])["rex"]


def test_a_second_judge_of_images(judge: Encoder, concepts: list[Concept]) -> None:
    vision = ImageEncoder(id="v", weights="", embed_images=lambda images: judge.images(images).flip(1) ** 2)
    both = prepare([judge, vision], reference_images(concepts))
    scores = both([plain("blue")], ["a <rex>"], TOKENS, ["rex"])["rex"]
    blue, red = (np.array(COLOURS[name], float) for name in ("blue", "red"))
    assert scores["vision"].item() == pytest.approx(
        (cosine(blue**2, red**2) + cosine(blue**2, (red + 20) ** 2)) / 2, abs=1e-6
    )


def test_few_images_in_memory(score: Scorer, tmp_path: Path) -> None:
    """Files are read batch by batch, and each image gets its own scores."""
    reads: list[int] = []

    def read(path: Path) -> Image.Image:
        reads.append(int(path.name))
        return Image.new("RGB", (8, 8), (3 * int(path.name), 100, 50))

    images = ImageFiles([tmp_path / str(number) for number in range(70)], read)
    prompts = [f"a {'red' if number % 2 else 'green'} <rex>" for number in range(70)]
    scores = score(images, prompts, TOKENS, ["rex"])["rex"]
    last = score([images[69]], prompts[-1:], TOKENS, ["rex"])["rex"]
    assert reads == [*range(70), 69]
    for metric, values in scores.items():
        assert values.shape == (70,)
        assert values[-1].item() == pytest.approx(last[metric].item(), abs=1e-6)


def test_a_judge_without_references(judge: Encoder, concepts: list[Concept]) -> None:
    """Such as a model of preferences: it needs no other file than its own."""

    class Brightness:
        kind, id, weights = "brightness", "mean", ""
        metrics: Mapping[str, Metric] = {"brightness": Metric(title="brightness", is_main=True)}

        def prepare(self, _: References) -> Scorer:
            return lambda images, _prompts, _tokens, shown: {
                name: {"brightness": torch.tensor([float(np.asarray(image).mean()) for image in images])}
                for name in shown
            }

    score = prepare([judge, Brightness()], reference_images(concepts))
    scores = score([plain("red")], ["a <rex>"], TOKENS, ["rex"])["rex"]
    assert list(scores) == [*METRICS, "brightness"]
    assert scores["brightness"].item() == pytest.approx(sum(COLOURS["red"]) / 3)


def test_what_cannot_be_scored(judge: Encoder, score: Scorer) -> None:
    with pytest.raises(SboraError, match="got 1 images and 2 prompts"):
        score([plain("red")], ["a <rex>", "a <rex>"], TOKENS, ["rex"])
    with pytest.raises(SboraError, match="got 0 images and 0 prompts"):
        score([], [], TOKENS, ["rex"])
    with pytest.raises(SboraError, match="expected one of each kind"):
        prepare([judge, judge], {})
    with pytest.raises(SboraError, match="the concept rex has no reference images"):
        prepare([judge], {"rex": []})
