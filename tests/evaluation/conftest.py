"""A tiny base model, two concepts that differ in colour, adapters for them, and a judge that sees colours only."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept, ConceptImage
from sbora_diffusion.evaluation.judges.clip import Encoder
from sbora_diffusion.evaluation.suites import Prompt, Suite
from sbora_diffusion.models.base import Base, load_base

from ..adapters.random_adapters import adapter
from ..tiny_pipeline import WIDTH, save_tiny_pipeline

COLOURS = {"red": (220, 30, 20), "blue": (20, 40, 210), "green": (30, 200, 60), "dog": (200, 90, 40)}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder))


@pytest.fixture(scope="session")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> list[Concept]:
    """rex is red, tom is blue, and ann, of whom there is no adapter, is green."""
    folder = tmp_path_factory.mktemp("concepts")
    return [_concept(folder, name, colour) for name, colour in (("rex", "red"), ("tom", "blue"), ("ann", "green"))]


@pytest.fixture(scope="session")
def adapters(base: Base) -> list[Adapter]:
    """Of rex and tom, with random weights that change the images visibly."""
    return [make_adapter(base, name, 4 * number) for number, name in enumerate(("rex", "tom"))]


def make_adapter(base: Base, name: str, start: int, token: str = "") -> Adapter:
    made = adapter(
        Interval(start, 4),
        seed=start,
        shapes=base.layer_shapes,
        name=name,
        base_id=base.id,
        base_fingerprint=base.fingerprint,
        tokens={token or f"<{name}>": "dog"},
    )
    generator = torch.Generator().manual_seed(start)
    embeddings = {key: torch.randn(1, WIDTH, generator=generator) for key in made.tokens}
    return Adapter(made.spec, made.factors, embeddings)


def _concept(folder: Path, name: str, colour: str) -> Concept:
    images = []
    for number in range(2):
        path = folder / f"{name}-{number}.png"
        Image.new("RGB", (40, 40), tuple(value + 20 * number for value in COLOURS[colour])).save(path)
        images.append(ConceptImage(path=path, caption=f"a <{name}>"))
    return Concept(name=name, token=f"<{name}>", class_noun="dog", images=tuple(images))


@pytest.fixture(scope="session")
def judge() -> Encoder:
    """Embeds an image as its mean colour, a text as the sum of the colours that it names."""
    return Encoder(id="colours", weights="0" * 16, embed_images=_mean_colours, embed_texts=_named_colours)


def _mean_colours(images: Sequence[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).float().mean((0, 1)) for image in images])


def _named_colours(texts: Sequence[str]) -> Tensor:
    named = [[COLOURS.get(word, (1, 1, 1)) for word in text.split()] for text in texts]
    return torch.tensor([[float(sum(channel)) for channel in zip(*colours, strict=True)] for colours in named])


@pytest.fixture
def suite() -> Suite:
    prompts = tuple(Prompt.parse(text, "object") for text in ("a red {}", "a {} on a blue background", "a green {}"))
    return Suite(name="colours", prompts=prompts, sha256="c0ffee" + "0" * 58)


@pytest.fixture
def joint_suite() -> Suite:
    prompts = tuple(Prompt.parse(text, "joint") for text in ("a {0} and a {1}", "a red {1} and a {0}"))
    return Suite(name="pairs", prompts=prompts, sha256="f00d" + "0" * 60)
