"""What a training looks at, computed once: encoded pictures with their captions, and the base model's own answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor

from sbora_diffusion.diffusion.base import Base
from sbora_diffusion.diffusion.concept import Concept
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import load_picture, to_tensor


class Noising:
    """The forward process of a base model's scheduler, and what its U-Net is to predict."""

    def __init__(self, base: Base) -> None:
        self._scheduler: Any = DDPMScheduler.from_config(base.pipeline.scheduler.config)
        self.num_timesteps = self._scheduler.config.num_train_timesteps
        self._kind = self._scheduler.config.prediction_type
        if self._kind not in ("epsilon", "v_prediction"):
            raise NotImplementedError(self._kind)

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at the timesteps t (n,)."""
        return self._scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or v (Salimans & Ho 2022)."""
        return noise if self._kind == "epsilon" else self._scheduler.get_velocity(latents, noise, t)


@dataclass(frozen=True, eq=False)
class Batch:
    """n noisy latents, their timesteps (n,) and token ids (n, length), and what the U-Net should answer."""

    noisy: Tensor
    t: Tensor
    ids: Tensor
    target: Tensor

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(*(torch.cat([getattr(self, key), getattr(other, key)]) for key in vars(self)))


def tokenize(base: Base, captions: Sequence[str]) -> Tensor:
    """(len(captions), length) int64 ids, tokens of several vectors expanded, too long captions cut."""
    tokenizer = base.pipeline.tokenizer
    prompts = base.pipeline.maybe_convert_prompt(list(captions), tokenizer)
    encoded = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids.to(base.device)


def predict(base: Base, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    """The U-Net's answer under the text encoder's reading of the ids."""
    states = base.pipeline.text_encoder(ids).last_hidden_state
    return base.pipeline.unet(noisy, t, states).sample


@torch.no_grad()
def encode(base: Base, concept: Concept, config: TrainConfig) -> tuple[Tensor, list[str]]:
    """Latents of `config.crops` random crops of every picture, and each one's caption."""
    generator = torch.Generator().manual_seed(config.seed)
    latents, captions = [], []
    for picture in concept.pictures:
        image = load_picture(picture.path)
        crops = [_crop(image, generator, config.smallest_crop) for _ in range(config.crops)]
        pixels = torch.stack([to_tensor(crop, base.resolution) for crop in crops]).to(base.device)
        latents += [base.pipeline.vae.encode(pixels).latent_dist.mode() * base.pipeline.vae.config.scaling_factor]
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
    t = stratified_timesteps(count, noising.num_timesteps, generator).to(base.device)
    noise = torch.randn((count, *latents.shape[1:]), generator=generator).to(base.device)
    noisy, ids = noising.add(latents[rows], noise, t), ids[rows]
    predicted = [predict(base, *parts) for parts in zip(noisy.split(8), t.split(8), ids.split(8), strict=True)]
    return Batch(noisy, t, ids, torch.cat(predicted))


@torch.no_grad()
def draw_latents(base: Base, prompts: Sequence[str], config: TrainConfig) -> Tensor:
    """The base model's own pictures of the prompts, as latents (len(prompts), channels, height, width)."""
    if not prompts:
        return torch.empty(0)
    result: Any = base.pipeline(
        list(prompts),
        num_inference_steps=config.sampling_steps,
        guidance_scale=config.guidance,
        generator=[torch.Generator("cpu").manual_seed(config.seed + number) for number in range(len(prompts))],
        output_type="latent",
    )
    return result.images


def stratified_timesteps(count: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 timesteps, one from each of `count` equal parts of the range."""
    points = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (points * num_timesteps).long().clamp(max=num_timesteps - 1)
