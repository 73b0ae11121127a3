"""An exponential moving average (EMA) of the trained parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


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

    def load(self, values: Sequence[Tensor]) -> None:
        """Restore saved averages."""
        for value, saved in zip(self.values, values, strict=True):
            value.copy_(saved)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averages into the parameters inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, parameter in zip(self.values, self._parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)
