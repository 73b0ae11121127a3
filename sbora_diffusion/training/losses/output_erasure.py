"""Randomised output erasure (BlockLoRA, arXiv 2503.08575): penalize an adapter's output on other inputs than its own.

The inputs are those of the prior samples of each step; `OutputPenalty` has the closed form of their mean.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbora_diffusion.adapters.layer import SboraLayer
from sbora_diffusion.data.batches import StepBatch
from sbora_diffusion.models.base import Base


class OutputErasure:
    """The mean over the layers of ‖ΔW x‖² / ‖W x‖² on the prior samples of the recorded batch."""

    def __init__(self, base: Base, layers: Mapping[str, Mapping[str, SboraLayer]], weight: float = 1.0) -> None:
        self.weight = weight
        self._layers = {f"{part}.{name}": layer for part, by_name in layers.items() for name, layer in by_name.items()}
        self._weights = {key: base.layers[key] for key in self._layers}
        self._inputs: dict[str, Tensor] = {}

    @contextmanager
    def recording(self, batch: StepBatch) -> Iterator[None]:
        """Record the layers' inputs of the prior samples, the last rows of the concept samples' forward pass."""
        assert batch.prior_fits and batch.prior is not None  # noqa: PT018
        num_prior = len(batch.prior.t)

        def recorder(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self._inputs[key] = inputs[0].detach()[-num_prior:]

            return hook

        modules: dict[str, Any] = {key: layer.module for key, layer in self._layers.items()}
        hooks = [module.register_forward_pre_hook(recorder(key)) for key, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, *_: object) -> Tensor:
        """Return the mean over the layers."""
        shares = []
        for key, layer in self._layers.items():
            x, base = self._inputs[key], self._weights[key]
            x = x.float()
            added = F.linear(x[..., layer.index], layer.delta()) if layer.side == "fa" else F.linear(x, layer.delta())
            with torch.no_grad():
                before = F.linear(x, base.weight.float()).pow(2).sum()
            shares.append(added.pow(2).sum() / before)
        return torch.stack(shares).mean()
