"""The weights that ship: diffusers loads them, they are small, and they do what their captions say."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from sbora_diffusion.data.latents import FILE, prior_latents, sample_prior
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.methods.registry import configure, method_names
from sbora_diffusion.models.base import Base, load_base
from tools.emoji.model import WEIGHTS
from tools.emoji.world import load_world


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("emoji64")


def draw(base: Base, *prompts: str) -> np.ndarray:
    """(prompts, 64, 64, 3) float, 0 to 255."""
    images = generate(base, prompts, seeds=range(len(prompts)), steps=12)
    return np.stack([np.asarray(image, float) for image in images])


def test_diffusers_loads_them_and_they_are_small() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    assert isinstance(pipeline, StableDiffusionPipeline)
    files = [path for path in Path(WEIGHTS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}


def test_plain_backgrounds_have_their_colour(base: Base) -> None:
    colours = load_world().colours
    images = draw(base, *(f"a 3d crown on a {colour} background" for colour in colours))
    for image, (name, colour) in zip(images, colours.items(), strict=True):
        corner = image[:8, :8].mean((0, 1))
        assert np.abs(corner - colour).max() < 45, f"{name}: {corner}"


def test_nouns_are_bound(base: Base) -> None:
    """A heart is red and a frog is green, in the same place and from the same seeds."""
    images = draw(base, *(f"a 3d {noun} on a white background" for noun in ("heart", "frog")))
    heart, frog = images[:, 24:44, 24:44].mean((1, 2))
    assert heart[0] > heart[1] + 40
    assert frog[1] > frog[0]


def test_the_prior_images_that_ship_are_what_the_model_draws(base: Base) -> None:
    """Otherwise they are of older weights or prompts: python -m tools.emoji.prior"""
    shipped = safetensors.torch.load_file(WEIGHTS / FILE)["latents"]
    for method in method_names():
        assert torch.equal(prior_latents(base, configure("emoji64", method, {})), shipped.float()), method
    drawn = sample_prior(base, configure("emoji64", "sbora-fa", {}))
    assert (drawn - shipped).abs().max() < 0.05  # fp16, and what ten steps make of another machine's rounding


@pytest.mark.parametrize("other", [{"prior_prompts": "a cat"}, {"sampling_steps": "1"}, {"guidance": "1"}])
def test_other_prior_images_than_ship_are_drawn(base: Base, other: dict[str, str]) -> None:
    """From the seeds 0, 1, …, whatever the training's own."""
    few = {"prior_prompts": "a cat;a dog", "sampling_steps": "2"} | other
    config = configure("emoji64", "sbora-fa", few | {"seed": "3"})
    drawn = prior_latents(base, config)
    assert len(drawn) == len(config.loss.prior_prompts)
    assert torch.equal(drawn, prior_latents(base, config.with_settings(seed=0)))
