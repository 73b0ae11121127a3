"""Mixed precision of a training, and checks for values that are not finite."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.models.loading import TYPES
from sbora_diffusion.utils.errors import SboraError

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
