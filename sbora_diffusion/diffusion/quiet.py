"""How loud an adapter is on inputs that are not its concept's, in closed form: no forward pass is needed for it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbora_diffusion.adapter.layer import SboraLayer
from sbora_diffusion.diffusion.base import Base


class Moments:
    """Running E[x xᵀ] (in, in) float32 of the inputs x of each adapted layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, key: str, inputs: Tensor) -> None:
        """Inputs (..., in) of the layer `key`."""
        rows = inputs.detach().flatten(0, -2).float()
        self._sums[key] = self._sums.get(key, 0) + rows.T @ rows
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def means(self) -> dict[str, Tensor]:
        """By "<component>.<canonical layer>"."""
        return {key: total / self._counts[key] for key, total in self._sums.items()}


@contextmanager
def recorded_inputs(base: Base) -> Iterator[Moments]:
    """The moments of everything that passes the base model's adapted layers meanwhile."""
    moments, hooks = Moments(), []

    def recorder(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: moments.add(key, inputs[0])

    try:
        for key, layer in base.layers.items():
            hooks.append(layer.register_forward_pre_hook(recorder(key)))
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, eq=False)
class _Term:
    layer: SboraLayer
    moments: Tensor  # (r, r) of the layer's own columns for fa, (in, in) for fb
    base_response: float  # E‖W x‖²


class Loudness:
    """The mean over the layers of E‖ΔW x‖² / E‖W x‖² on inputs x that were recorded before.

    What BlockLoRA (arXiv 2503.08575) has the network learn from randomised inputs ("output erasure") is for a linear
    layer the quadratic form tr(ΔW E[x xᵀ] ΔWᵀ), for SBoRA-FA of r × r moments.
    """

    def __init__(
        self, base: Base, layers: Mapping[str, Mapping[str, SboraLayer]], moments: Mapping[str, Tensor]
    ) -> None:
        self._terms: list[_Term] = []
        for component, by_name in layers.items():
            for name, layer in by_name.items():
                seen, weight = moments[f"{component}.{name}"], base.layers[f"{component}.{name}"].weight
                own = seen[layer.index][:, layer.index] if layer.side == "fa" else seen
                self._terms.append(_Term(layer, own, _response(weight.detach().float(), seen).item()))

    def __call__(self) -> Tensor:
        """A scalar that the adapter's factors learn from."""
        return torch.stack(
            [_response(term.layer.delta(), term.moments) / term.base_response for term in self._terms]
        ).mean()


def _response(weight: Tensor, moments: Tensor) -> Tensor:
    """E‖W x‖² = tr(W E[x xᵀ] Wᵀ)."""
    return ((weight @ moments) * weight).sum()
