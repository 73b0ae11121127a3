"""Half precision where a training computes, and a watch over what is not a number."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.utils.errors import SboraError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "nf4": torch.bfloat16}
PATIENCE = 20  # steps that fp16 may skip in a row while its scale is being found


class Precision:
    """The arithmetic of a training: autocast, with a scaled loss for fp16; parameters and optimiser stay in fp32."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device, self._skipped = name, device, 0
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")  # type: ignore[attr-defined]

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Where the model computes."""
        return torch.autocast(self._device.type, TYPES[self._name], enabled=self._name != "fp32")

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; there are none where it depends on nothing that is trained."""
        if loss.requires_grad:
            self._scaler.scale(loss).backward()

    def step(
        self, optimizer: Any, parameters: Mapping[str, Sequence[Tensor]], max_norm: float, loss: float, step: int
    ) -> None:
        """One optimiser step with the gradients' norm clipped.

        With fp16 a step whose gradients overflow is left out, as its scale is too large: it is halved. A step without
        any gradient (a token alone, and all captions dropped) changes nothing.

        Args:
            parameters: by the name of their part, which an error names.

        Raises:
            SboraError: the loss or a gradient is not finite.
        """
        everything = [parameter for part in parameters.values() for parameter in part]
        if loss == loss and all(parameter.grad is None for parameter in everything):
            optimizer.step()  # the scaler would ask for gradients
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
            return "fp16 cannot hold this model's numbers: --set precision=bf16"
        first = optimizer.param_groups[0]
        return f"train with a lower rate: --set learning_rate={first.get('initial_lr', first['lr']) / 10:.0e}"

    def state(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {"scaler": self._scaler.state_dict(), "skipped": self._skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self._skipped = state["skipped"]
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
