"""Second moments of the inputs of a base model's layers, accumulated while it computes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from sbora_diffusion.models.base import Base


class Moments:
    """Running E[x xᵀ] of the inputs x of layers, in float64.

    Args:
        columns: by layer, the columns of x to accumulate; None for all.
    """

    def __init__(self, columns: Mapping[str, Tensor | None]) -> None:
        self._columns = columns
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, key: str, inputs: Tensor) -> None:
        """Add inputs (..., in) of the layer `key`."""
        rows, columns = inputs.detach().flatten(0, -2), self._columns[key]
        if columns is not None:
            rows = rows[:, columns.to(rows.device)]
        rows = rows.double()
        self._sums[key] = self._sums.get(key, 0) + rows.T @ rows
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def means(self) -> dict[str, Tensor]:
        """Return (n, n) float64 on the CPU, by "<component>.<canonical layer>"."""
        return {key: (total / self._counts[key]).cpu() for key, total in self._sums.items()}


@contextmanager
def recorded_inputs(base: Base, columns: Mapping[str, Tensor | None]) -> Iterator[Moments]:
    """Record the inputs of these layers of the base model inside the context; `columns` as for `Moments`."""
    moments, hooks = Moments(columns), []

    def recorder(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: moments.add(key, inputs[0])

    try:
        for key in columns:
            hooks.append(base.layers[key].register_forward_pre_hook(recorder(key)))
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
