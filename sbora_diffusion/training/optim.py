"""Optimizers, parameter groups and learning rate schedules of a training."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sbora_diffusion.methods.live import InjectedConcept
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError

PACKAGES = {"adamw-8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule-free": "schedulefree"}


def parameter_groups(live: InjectedConcept, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the trained parameters in groups with "params" and "lr"."""
    denoiser, optim = live.base.family.denoiser, config.optim
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": optim.learning_rate if part == denoiser else optim.text_encoder_learning_rate}
        for part, parameters in live.trained.items()
    ]
    return [*groups, {"params": live.embeddings, "lr": optim.token_learning_rate}]


def make_schedule(optimizer: Any, config: TrainConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of the learning rates."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return the factor of the learning rates at a step (from 0): a linear warm-up, then the scheduler.

    "linear" and "cosine" decrease to `final_learning_rate` at the last step.
    """
    progress = step / config.optim.steps
    left = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
        config.optim.scheduler
    ]
    decayed = config.optim.final_learning_rate + (1 - config.optim.final_learning_rate) * left
    return min(1.0, (step + 1) / max(1, config.optim.warmup_steps)) * decayed


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig, device: torch.device) -> Any:
    """Return the optimizer of the settings over parameter groups.

    AdamW (Loshchilov & Hutter 2019), its 8-bit form (Dettmers et al. 2022), Prodigy (Mishchenko & Defazio 2024), which
    finds its own learning rate, so that a group's is only zero or not, or schedule-free AdamW (Defazio et al. 2024).

    Raises:
        SboraError: its package is not installed, or it does not work on this device.
    """
    name, decay = config.optim.optimizer, config.optim.weight_decay
    if name == "adamw":
        # on a CPU, where torch's default is not fused, a step over fifty small factors is five times faster fused
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True if device.type == "cpu" else None)
    try:
        if name == "prodigy":
            from prodigyopt import Prodigy

            trained = [{"params": group["params"], "lr": 1.0} for group in groups if group["lr"]]
            options: dict[str, Any] = {"weight_decay": decay, "safeguard_warmup": True, "use_bias_correction": True}
            return Prodigy(trained, lr=1.0, **options)
        if name == "schedule-free":
            from schedulefree import AdamWScheduleFree

            optimizer = AdamWScheduleFree(groups, weight_decay=decay)
            optimizer.train()
            return optimizer
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        package = PACKAGES[name]
        raise SboraError(f"optimizer={name} needs the package {package}", f"pip install {package}") from None
    if device.type != "cuda":
        raise SboraError("optimizer=adamw-8bit needs a GPU", "--set optimizer=adamw")
    return AdamW8bit(groups, weight_decay=decay)


@contextmanager
def eval_parameters(optimizer: Any) -> Iterator[None]:
    """Put the optimizer's averaged parameters in place inside the context; only schedule-free has some."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]  # switching back and forth would round them
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
