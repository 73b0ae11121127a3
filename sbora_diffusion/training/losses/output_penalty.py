"""The output penalty: an adapter's response on inputs of other prompts, in closed form, without a forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sbora_diffusion.adapters.fuse import response
from sbora_diffusion.adapters.layer import SboraLayer
from sbora_diffusion.adapters.linear_function import full_weight
from sbora_diffusion.models.base import Base


@dataclass(frozen=True, eq=False)
class _Group:
    """Layers of one shape, whose responses are one batched product."""

    layers: list[SboraLayer]
    moments: Tensor  # (n, r, r) of the layers' own columns for fa, (n, in, in) for fb, each divided by E‖W x‖²

    def __call__(self) -> Tensor:
        return response(torch.stack([layer.delta() for layer in self.layers]), self.moments)


class OutputPenalty:
    """The mean over the layers of E‖ΔW x‖² / E‖W x‖² on inputs x recorded before the training.

    BlockLoRA's output erasure (arXiv 2503.08575) on randomised inputs is, in a linear layer's mean, the quadratic form
    tr(ΔW E[x xᵀ] ΔWᵀ); for SBoRA-FA it needs r × r moments only.
    """

    def __init__(
        self,
        base: Base,
        layers: Mapping[str, Mapping[str, SboraLayer]],
        moments: Mapping[str, Tensor],
        weight: float = 1.0,
    ) -> None:
        self.weight = weight
        by_shape: dict[tuple[object, ...], list[tuple[SboraLayer, Tensor]]] = {}
        for component, by_name in layers.items():
            for name, layer in by_name.items():
                frozen = full_weight(base.layers[f"{component}.{name}"].weight).detach().float()
                seen = moments[f"{component}.{name}"].to(frozen)
                own = seen[layer.index][:, layer.index] if layer.side == "fa" else seen
                shape = (*layer.trained.shape, *own.shape)
                by_shape.setdefault(shape, []).append((layer, own / response(frozen, seen)))
        self._groups = [
            _Group([layer for layer, _ in group], torch.stack([m for _, m in group])) for group in by_shape.values()
        ]
        self._count = sum(len(group.layers) for group in self._groups)

    def __call__(self, *_: object) -> Tensor:
        """Return the mean over the layers."""
        return torch.stack([group() for group in self._groups]).sum() / self._count
