"""The optimisers that a training can choose from, and what is shown of what they have learned."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.recipes.config import TrainConfig

PACKAGES = {"adamw-8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule-free": "schedulefree"}


def make_optimizer(groups: list[dict[str, Any]], config: "TrainConfig", device: torch.device) -> Any:
    """The optimiser of the settings over parameter groups with "params" and "lr".

    AdamW (Loshchilov & Hutter 2019), its 8-bit form (Dettmers et al. 2022), Prodigy (Mishchenko & Defazio 2024), which
    finds its own rate, so that the groups' only say what is trained, or schedule-free AdamW (Defazio et al. 2024).

    Raises:
        SboraError: its package is not installed, or it does not work on this device.
    """
    name, decay = config.optim.optimizer, config.optim.weight_decay
    if name == "adamw":
        # torch does not fuse by itself on a CPU, where a step over fifty small factors is five times faster so
        return torch.optim.AdamW(groups, weight_decay=decay, fused=True if device.type == "cpu" else None)
    try:
        if name == "prodigy":
            from prodigyopt import Prodigy

            alike = [{"params": group["params"], "lr": 1.0} for group in groups if group["lr"]]
            options: dict[str, Any] = {"weight_decay": decay, "safeguard_warmup": True, "use_bias_correction": True}
            return Prodigy(alike, lr=1.0, **options)
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
    """Meanwhile the parameters are what the optimiser would hand out: schedule-free keeps others while it learns."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]  # there and back again rounds
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
