"""What a training looks at, computed once: encoded pictures with their captions, and the base model's own answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.diffusion.base import Base
from sbora_diffusion.diffusion.concept import Concept
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import load_picture, to_tensor
from sbora_diffusion.diffusion.families.noising import Noising


@dataclass(frozen=True, eq=False)
class Batch:
    """n noisy latents, their timesteps (n,) and token ids (n, length), and what the model should answer."""

    noisy: Tensor
    t: Tensor
    ids: Tensor
    target: Tensor

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(*(torch.cat([getattr(self, key), getattr(other, key)]) for key in vars(self)))


@torch.no_grad()
def encode(base: Base, concept: Concept, config: TrainConfig) -> tuple[Tensor, list[str]]:
    """Latents of `config.crops` random crops of every picture, and each one's caption."""
    generator = torch.Generator().manual_seed(config.seed)
    latents, captions = [], []
    for picture in concept.pictures:
        image = load_picture(picture.path)
        crops = [_crop(image, generator, config.smallest_crop) for _ in range(config.crops)]
        pixels = torch.stack([to_tensor(crop, base.resolution) for crop in crops]).to(base.device)
        latents += [base.to_latents(pixels)]
        captions += [picture.caption] * config.crops
    return torch.cat(latents), captions


def _crop(image: Image.Image, generator: torch.Generator, smallest: float) -> Image.Image:
    """A random crop of at least `smallest` of the picture's sides."""
    part, left, top = torch.rand(3, generator=generator).tolist()
    part = smallest + (1 - smallest) * part
    width, height = round(image.width * part), round(image.height * part)
    x, y = round((image.width - width) * left), round((image.height - height) * top)
    return image.crop((x, y, x + width, y + height))


@torch.no_grad()
def answers(
    base: Base, latents: Tensor, ids: Tensor, noising: Noising, count: int, generator: torch.Generator
) -> Batch:
    """What the base model answers to `count` noisy versions of latents, each under its caption."""
    rows = torch.randint(len(latents), (count,), generator=generator)
    t = noising.timesteps(count, generator).to(base.device)
    noise = torch.randn((count, *latents.shape[1:]), generator=generator).to(base.device)
    noisy, ids = noising.add(latents[rows], noise, t), ids[rows]
    predicted = [base.predict(*parts) for parts in zip(noisy.split(8), t.split(8), ids.split(8), strict=True)]
    return Batch(noisy, t, ids, torch.cat(predicted))


@torch.no_grad()
def draw_latents(base: Base, prompts: Sequence[str], config: TrainConfig) -> Tensor:
    """The base model's own pictures of the prompts, as latents (len(prompts), channels, height, width)."""
    if not prompts:
        return torch.empty(0)
    seeds = range(config.seed, config.seed + len(prompts))
    return base.draw(prompts, seeds=seeds, steps=config.sampling_steps, guidance=config.guidance, as_latents=True)
