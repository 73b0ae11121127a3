"""The base model's own pictures of the prior prompts: the embedded model brings them along, others draw them."""

import json
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from sbora_diffusion.data.latents import draw_latents
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.loading import EMBEDDED, embedded_folder
from sbora_diffusion.training.config import TrainConfig
from sbora_diffusion.utils.files import write_atomically

FILE = "prior.safetensors"  # in the embedded model's folder
_KEY, _ABOUT = "latents", "drawn from"


def prior_latents(base: Base, config: TrainConfig) -> Tensor:
    """A picture of each prior prompt, from the seeds 0, 1, …: latents (n, channels, height, width).

    They are what every training on this base model holds in place, whatever its own seed: data, as the concept's
    pictures are.
    """
    if base.id == EMBEDDED:
        with safe_open(embedded_folder() / FILE, "pt") as file:
            if file.metadata().get(_ABOUT) == _about(base, config):
                return file.get_tensor(_KEY).to(base.device).float()
    return draw_prior(base, config)


def draw_prior(base: Base, config: TrainConfig) -> Tensor:
    """The same, drawn now."""
    return draw_latents(base, config.prior_prompts, range(len(config.prior_prompts)), config)


def save_prior(base: Base, config: TrainConfig, path: Path) -> None:
    """Draw them into a file, in fp16."""
    latents = {_KEY: draw_prior(base, config).half().cpu().contiguous()}
    write_atomically(path, safetensors.torch.save(latents, {_ABOUT: _about(base, config)}))


def _about(base: Base, config: TrainConfig) -> str:
    """All that the pictures depend on."""
    told = {"fingerprint": base.fingerprint, "prompts": config.prior_prompts}
    return json.dumps(told | {"steps": config.sampling_steps, "guidance": config.guidance})
