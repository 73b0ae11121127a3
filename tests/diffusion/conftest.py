"""A tiny Stable Diffusion pipeline, loaded by the real code, a concept of two pictures, and a short recipe."""

from pathlib import Path

import pytest
from PIL import Image

from sbora_diffusion.diffusion.base import Base, load_base
from sbora_diffusion.diffusion.concept import Concept, Picture
from sbora_diffusion.diffusion.config import TrainConfig

from ..tiny_pipeline import save_tiny_pipeline
from ..tiny_sd2 import save_tiny_sd2

SHORT = {
    "steps": "6",
    "save_every": "2",
    "preview_every": "0",
    "sampling_steps": "2",
    "crops": "2",
    "rank": "4",
    "warmup_steps": "1",
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sd2(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(tiny_folder: Path) -> Base:
    return load_base(str(tiny_folder))


@pytest.fixture
def concept(tmp_path: Path) -> Concept:
    pictures = []
    for number, colour in enumerate(("red", "orange")):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 60), colour).save(path)
        pictures.append(Picture(path=path, caption=f"a <rex> in place {number}"))
    return Concept(name="rex", token="<rex>", class_noun="dog", pictures=tuple(pictures))


@pytest.fixture
def config() -> TrainConfig:
    return short_config()


def short_config(method: str = "sbora-fa", **settings: str) -> TrainConfig:
    return TrainConfig.from_recipe("tiny", method, SHORT | settings)
