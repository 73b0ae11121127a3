"""How loud an adapter is on inputs that are not its concept's, in closed form: no forward pass is needed for it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sbora_diffusion.adapter.fuse import response
from sbora_diffusion.adapter.layer import SboraLayer
from sbora_diffusion.diffusion.base import Base


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
                weight = base.layers[f"{component}.{name}"].weight.detach().float()
                seen = moments[f"{component}.{name}"].to(weight)
                own = seen[layer.index][:, layer.index] if layer.side == "fa" else seen
                self._terms.append(_Term(layer, own, response(weight, seen).item()))

    def __call__(self) -> Tensor:
        """A scalar that the adapter's factors learn from."""
        return torch.stack(
            [response(term.layer.delta(), term.moments) / term.base_response for term in self._terms]
        ).mean()
