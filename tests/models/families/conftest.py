"""For every family: a tiny random pipeline, loaded by the real code, and two concepts that were trained in it.

SDXL also from one checkpoint file.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept, ConceptImage
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import StepLog
from sbora_diffusion.training.run import run_training

from ...helpers import train
from ...original_names import save_original_sdxl
from ...tiny_pipeline import save_tiny_pipeline
from ...tiny_sd2 import save_tiny_sd2
from ...tiny_sdxl import save_tiny_sdxl
from ...tiny_transformers import save_tiny_flux, save_tiny_sd3

SAVERS: dict[str, Callable[[Path], Path]] = {
    "sd": save_tiny_pipeline,
    "sd2": save_tiny_sd2,
    "sdxl": save_tiny_sdxl,
    "sd3": save_tiny_sd3,
    "flux": save_tiny_flux,
}
KINDS = (*SAVERS, "sdxl-file")
SETTINGS = {
    "rank": "4", "steps": "2", "save_every": "1", "preview_every": "0", "sampling_steps": "1", "crops": "1",
    "warmup_steps": "1", "learning_rate": "0.05", "text_encoder_learning_rate": "0.05", "token_learning_rate": "0.1",
    "token_vectors": "2", "precision": "fp32", "preview_prompts": "a {token}", "prior_prompts": "a cat",
}  # fmt: skip


@dataclass(frozen=True)
class Life:
    """What the tests of a family share: the saved pipeline, its base, and two trained concepts."""

    folder: Path
    base: Base
    concepts: tuple[Concept, Concept]
    adapters: tuple[Adapter, Adapter]

    @property
    def prompt(self) -> str:
        """Names both concepts; SD3's pipeline does not write out a token of several vectors."""
        return "a <rex> <rex>_1 and a <tom> <tom>_1" if self.base.family.name == "sd3" else "a <rex> and a <tom>"

    def load(self, precision: str) -> Base:
        """The same base model in another precision."""
        return _small(load_base(self.base.id, precision))

    def config(self, **settings: str) -> TrainConfig:
        return configure(self.base.family.name, "sbora-fa", SETTINGS | settings)


def tiny_base(kind: str, folder: Path) -> Base:
    """A base model of one of KINDS, saved under `folder`, in diffusers' format as `tiny`."""
    tiny = SAVERS[kind.removesuffix("-file")](folder / "tiny")
    base = load_base(str(save_original_sdxl(tiny, folder / "one.safetensors") if kind == "sdxl-file" else tiny))
    return _small(base)


def _small(base: Base) -> Base:
    if base.family.name == "flux":
        base.pipeline.default_sample_size = 8  # latents; no file says it, FLUX's own is 128
    return base


@pytest.fixture(scope="module", params=KINDS)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, lives: dict[str, Life]) -> Life:
    if request.param not in lives:
        lives[request.param] = make_life(request.param, tmp_path_factory.mktemp(request.param))
    return lives[request.param]


@pytest.fixture(scope="session")
def lives() -> dict[str, Life]:
    """What was trained already: the modules of tests share it."""
    return {}


def make_life(kind: str, folder: Path) -> Life:
    base = tiny_base(kind, folder)
    config = configure(base.family.name, "sbora-fa", SETTINGS)
    concepts = (make_concept(folder, "rex", "red"), make_concept(folder, "tom", "blue"))
    intervals = (Interval(0, 4), Interval(4, 4))
    rex, tom = (
        last_of(concept, base, interval, config, folder / f"{concept.name}-run")
        for concept, interval in zip(concepts, intervals, strict=True)
    )
    return Life(folder / "tiny", base, concepts, (rex, tom))


def last_of(
    concept: Concept, base: Base, interval: Interval | None, config: TrainConfig, run: Path, resume: bool = False
) -> Adapter:
    return train(concept, base, interval, config, run, resume=resume).adapter


def train_and_copy(
    concept: Concept, base: Base, interval: Interval | None, config: TrainConfig, run: Path, copy: Path
) -> Adapter:
    """Train, and copy the run folder as an interruption after the first step would leave it."""

    def copy_first(log: StepLog) -> None:
        if log.step == 1:
            shutil.copytree(run, copy)

    return run_training(concept, base, interval, config, run, on_step=copy_first).adapter


def make_concept(folder: Path, name: str, colour: str) -> Concept:
    path = folder / f"{name}.png"
    Image.new("RGB", (40, 40), colour).save(path)
    image = ConceptImage(path=path, caption=f"a <{name}>")
    return Concept(name=name, token=f"<{name}>", class_noun="dog", images=(image,))


def draw_plain(pipeline: Any, prompt: str) -> np.ndarray:
    """(height, width, 3) numbers between 0 and 1, drawn as anybody would, without a line of ours."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "generator": generator}
    return pipeline(prompt, height=16, width=16, **options).images[0]


def vanilla(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
