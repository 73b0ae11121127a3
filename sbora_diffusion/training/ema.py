"""An exponential moving average of what is being trained, which is smoother than its last step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """EMA of parameters, which they can change places with.

    Args:
        decay: of a step; less at the beginning, min(decay, (1 + n) / (10 + n)) after n steps, as diffusers' EMA has it.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.values = [parameter.detach().clone() for parameter in parameters]
        self._parameters, self._decay = parameters, decay

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take over a little of what the parameters are after so many steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    def load(self, values: Sequence[Tensor]) -> None:
        """Go on from averages that were saved."""
        for value, saved in zip(self.values, values, strict=True):
            value.copy_(saved)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the parameters are the averages."""
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
