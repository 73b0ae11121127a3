"""Optimizers, parameter groups and learning rate schedules of a training."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.methods.live import InjectedConcept
from sbora_diffusion.models.loading import TYPES
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


@torch.no_grad()
def set_parameters(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Restore the parameters' current values at the end of the context."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        set_parameters(parameters, kept)


@contextmanager
def eval_parameters(optimizer: Any) -> Iterator[None]:
    """Put the optimizer's averaged parameters in place inside the context; only schedule-free has some."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    with restored([parameter for group in optimizer.param_groups for parameter in group["params"]]):
        optimizer.eval()  # switching back with `train` alone would round the parameters
        try:
            yield
        finally:
            optimizer.train()


class EMA:
    """The EMA of parameters.

    diffusers' EMAModel has the same decay, but its update rounds differently, so that resuming would change results.

    Args:
        decay: per step; smaller at the beginning: min(decay, (1 + n) / (10 + n)) after n steps.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._parameters, self._decay = parameters, decay

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Move the averages towards the parameters after the given number of steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in place of the parameters inside the context."""
        with restored(self._parameters):
            set_parameters(self._parameters, self.values)
            yield


PATIENCE = 20  # steps that fp16 may skip in a row until its loss scale is small enough


class Precision:
    """The arithmetic of a training: autocast, with a scaled loss for fp16; parameters and optimiser stay in fp32."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device, self._skipped = name, device, 0
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")  # type: ignore[attr-defined]

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Return the autocast context for the model."""
        return torch.autocast(self._device.type, TYPES[self._name], enabled=self._name != "fp32")

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; do nothing if it depends on no trained parameter."""
        if loss.requires_grad:
            self._scaler.scale(loss).backward()

    def step(
        self, optimizer: Any, parameters: Mapping[str, Sequence[Tensor]], max_norm: float, loss: float, step: int
    ) -> None:
        """Clip the gradients' norm and step the optimizer.

        With fp16 a step whose gradients overflow is skipped and the loss scale halved. A step without any gradient
        (only a token is trained, and all captions are dropped) changes nothing.

        Args:
            parameters: by the name of their component, for error messages.

        Raises:
            SboraError: the loss or a gradient is not finite.
        """
        everything = [parameter for part in parameters.values() for parameter in part]
        if loss == loss and all(parameter.grad is None for parameter in everything):
            optimizer.step()  # the scaler requires gradients
            return
        self._scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(everything, max_norm)
        finite = torch.isfinite(norm).item() and loss == loss
        self._skipped = 0 if finite else self._skipped + 1
        if not finite and (self._name != "fp16" or self._skipped > PATIENCE):
            raise SboraError(self._reason(parameters, loss, step), self._advice(optimizer))
        self._scaler.step(optimizer)
        self._scaler.update()

    def _reason(self, parameters: Mapping[str, Sequence[Tensor]], loss: float, step: int) -> str:
        if loss != loss:
            return f"the loss is {loss} at step {step + 1}"
        broken = [
            name
            for name, part in parameters.items()
            if any(p.grad is not None and not torch.isfinite(p.grad).all() for p in part)
        ]
        return f"the gradients of the {' and '.join(broken) or 'adapter'} are not finite at step {step + 1}"

    def _advice(self, optimizer: Any) -> str:
        if self._name == "fp16":
            return "fp16 overflows on this model: --set precision=bf16"
        first = optimizer.param_groups[0]
        return f"use a lower learning rate: --set learning_rate={first.get('initial_lr', first['lr']) / 10:.0e}"

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {"scaler": self._scaler.state_dict(), "skipped": self._skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`."""
        self._skipped = state["skipped"]
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
