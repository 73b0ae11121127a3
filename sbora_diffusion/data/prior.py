"""The base model's own images of the prior prompts: shipped with the embedded model, generated for others."""

import json
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from sbora_diffusion.data.latents import sample_latents
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.loading import EMBEDDED, embedded_folder
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.files import write_atomically

FILE = "prior.safetensors"  # in the embedded model's folder
_KEY, _SOURCE = "latents", "drawn from"


def prior_latents(base: Base, config: TrainConfig) -> Tensor:
    """Return an image of each prior prompt from the seeds 0, 1, …, as latents (n, channels, height, width).

    They are the same for every training on this base model, whatever its seed.
    """
    if base.id == EMBEDDED:
        with safe_open(embedded_folder() / FILE, "pt") as file:
            if file.metadata().get(_SOURCE) == _describe(base, config):
                return file.get_tensor(_KEY).to(base.device).float()
    return sample_prior(base, config)


def sample_prior(base: Base, config: TrainConfig) -> Tensor:
    """Generate these images."""
    return sample_latents(base, config.loss.prior_prompts, range(len(config.loss.prior_prompts)), config)


def save_prior(base: Base, config: TrainConfig, path: Path) -> None:
    """Generate these images and save them in fp16."""
    latents = {_KEY: sample_prior(base, config).half().cpu().contiguous()}
    write_atomically(path, safetensors.torch.save(latents, {_SOURCE: _describe(base, config)}))


def _describe(base: Base, config: TrainConfig) -> str:
    """Return everything that the images depend on."""
    source = {"fingerprint": base.fingerprint, "prompts": config.loss.prior_prompts}
    return json.dumps(source | {"steps": config.output.sampling_steps, "guidance": config.output.guidance})
