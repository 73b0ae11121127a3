"""The base model's own images of the prior prompts: the embedded model brings them along, others draw them."""

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
_KEY, _ABOUT = "latents", "drawn from"


def prior_latents(base: Base, config: TrainConfig) -> Tensor:
    """An image of each prior prompt, from the seeds 0, 1, …: latents (n, channels, height, width).

    They are what every training on this base model holds in place, whatever its own seed: data, as the concept's
    images are.
    """
    if base.id == EMBEDDED:
        with safe_open(embedded_folder() / FILE, "pt") as file:
            if file.metadata().get(_ABOUT) == _about(base, config):
                return file.get_tensor(_KEY).to(base.device).float()
    return sample_prior(base, config)


def sample_prior(base: Base, config: TrainConfig) -> Tensor:
    """The same, drawn now."""
    return sample_latents(base, config.loss.prior_prompts, range(len(config.loss.prior_prompts)), config)


def save_prior(base: Base, config: TrainConfig, path: Path) -> None:
    """Draw them into a file, in fp16."""
    latents = {_KEY: sample_prior(base, config).half().cpu().contiguous()}
    write_atomically(path, safetensors.torch.save(latents, {_ABOUT: _about(base, config)}))


def _about(base: Base, config: TrainConfig) -> str:
    """All that the images depend on."""
    told = {"fingerprint": base.fingerprint, "prompts": config.loss.prior_prompts}
    return json.dumps(told | {"steps": config.output.sampling_steps, "guidance": config.output.guidance})
