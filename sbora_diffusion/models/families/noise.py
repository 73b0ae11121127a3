"""How images become noise, and what the model is to predict: diffusion, and flow matching."""

from typing import Any, Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from sbora_diffusion.utils.errors import SboraError


class Noising(Protocol):
    """A forward process."""

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (count,) timesteps in the model's own units, one from each of `count` equally likely parts."""
        ...

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at the timesteps t (n,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model is to answer."""
        ...


class Diffusion:
    """The forward process of a pipeline's scheduler."""

    def __init__(self, pipeline: Any) -> None:
        self._scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._kind = self._scheduler.config.prediction_type
        if self._kind not in ("epsilon", "v_prediction"):
            raise SboraError(
                f"the base model predicts {self._kind!r}, expected epsilon or v_prediction",
                "its scheduler/scheduler_config.json says so",
            )

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64, stratified over the whole range."""
        number = self._scheduler.config.num_train_timesteps
        return (stratified(count, generator) * number).long().clamp(max=number - 1)

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at the timesteps t (n,)."""
        return self._scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or v (Salimans & Ho 2022)."""
        return noise if self._kind == "epsilon" else self._scheduler.get_velocity(latents, noise, t)

    def min_snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """(n,) weights of the squared errors at the timesteps t (Hang et al. 2023, equation 8, and its form for v).

        With SNR = signal² / noise²: min(SNR, γ) / SNR where noise is predicted, min(SNR, γ) / (SNR + 1) for v.
        """
        kept = self._scheduler.alphas_cumprod.to(t.device)[t].double()
        snr = kept / (1 - kept)
        if self._kind == "epsilon":
            return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr).float()
        return (snr.clamp(max=gamma) / (snr + 1)).float()


class FlowMatching:
    """A straight line from the image (t = 0) to noise (t = 1000): rectified flow (Esser et al. 2024, section 2).

    Args:
        shift: how far the noise levels are moved towards noise, as the scheduler does in generation (section 5.3.2).
    """

    def __init__(self, shift: float) -> None:
        self._shift = shift

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) float32 from 0 to 1000: logit-normal with mean 0 and deviation 1 (equation 19), then shifted."""
        level = torch.special.ndtri(stratified(count, generator).double()).sigmoid()
        return (1000 * self._shift * level / (1 + (self._shift - 1) * level)).float()

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at the timesteps t (n,)."""
        level = (t / 1000).view(-1, *[1] * (latents.ndim - 1)).to(latents)
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        """The direction of the line."""
        return noise - latents


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """(count,) from 0 to 1, one from each of `count` equal parts."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count
