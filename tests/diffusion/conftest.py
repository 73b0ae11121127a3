"""A tiny Stable Diffusion pipeline, loaded by the real code, concepts of two and four pictures, and a short recipe."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from torch import Tensor

from sbora_diffusion.adapter.basis import Interval
from sbora_diffusion.diffusion.base import Base, load_base
from sbora_diffusion.diffusion.concept import Concept, Picture
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.live import live_concept
from sbora_diffusion.diffusion.run import Run
from sbora_diffusion.diffusion.samples import prepare_data

from ..tiny_pipeline import save_tiny_pipeline
from ..tiny_sd2 import save_tiny_sd2

INTERVAL = Interval(4, 4)
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


@pytest.fixture
def tall(tmp_path: Path) -> Concept:
    """Four pictures: three wide ones, of which two are transparent around their subject, and a high one."""
    pictures = []
    for number, size in enumerate(((60, 40), (64, 40), (60, 40), (40, 70))):
        image = Image.new("RGBA" if number < 2 else "RGB", size, (0, 0, 0, 0) if number < 2 else "white")
        ImageDraw.Draw(image).ellipse(
            (4, 6, size[0] // 2, size[1] - 9), fill=("red", "orange", "blue", "green")[number]
        )
        image.save(tmp_path / f"{number}.png")
        pictures.append(Picture(path=tmp_path / f"{number}.png", caption=f"a <rex>, in place {number}, at night, wet"))
    return Concept(name="rex", token="<rex>", class_noun="dog", pictures=tuple(pictures))


def run_of(base: Base, concept: Concept, config: TrainConfig, steps: int = 1) -> tuple[Run, list[Tensor]]:
    """A training after some steps, and its gradients."""
    data = prepare_data(concept, base, config)
    with live_concept(concept, base, INTERVAL, config) as live:
        run = Run(live, data, config, base)
        for step in range(steps):
            run.advance(step)
        return run, [p.grad.clone() for p in live.parameters() if p.grad is not None]
