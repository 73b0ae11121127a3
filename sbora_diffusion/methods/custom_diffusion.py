"""Custom Diffusion (Kumari et al. 2023): the keys and values of a U-Net's cross-attention, as whole matrices."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sbora_diffusion.adapters.baseline_merges import merge_constrained
from sbora_diffusion.adapters.file import Adapter, Dense
from sbora_diffusion.methods.registry import Injected, Injection, Merge, MergeRequest, Method
from sbora_diffusion.utils.errors import SboraError


class _Added(nn.Module):
    """W + ΔW."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


@contextmanager
def inject(into: Injection) -> Iterator[Injected]:
    """Inject ΔW of every layer (section 3.1)."""
    if into.base.family.denoiser != "unet":
        raise SboraError(
            "custom-diffusion trains a U-Net's cross-attention, which this base model does not have",
            "choose another --method",
        )
    named = {f"unet.{name}": into.base.layers[f"unet.{name}"] for name in into.layers["unet"]}
    added = {key: _Added(layer.weight) for key, layer in named.items()}
    try:
        for key, layer in named.items():
            parametrize.register_parametrization(layer, "weight", added[key], unsafe=True)  # half weights, fp32 change
        yield Injected({"unet": [each.delta for each in added.values()]}, lambda: ({}, _read(added)))
    finally:
        for layer in named.values():
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _read(added: dict[str, _Added]) -> dict[str, Dense]:
    return {key: Dense(each.delta.detach().to("cpu", torch.float32).clone()) for key, each in added.items()}


def _adapts(key: str) -> bool:
    return key.startswith("unet.") and key.endswith((".attn2.to_k", ".attn2.to_v"))


def _merge_constrained(request: MergeRequest) -> Adapter:
    from sbora_diffusion.methods.calibration import prior_states, word_states

    base, adapters = request.model, request.adapters
    words = [word_states(base, adapter) for adapter in adapters]
    return merge_constrained(adapters, request.weights, words, prior_states(base, adapters))


METHODS = (
    Method(
        name="custom-diffusion",
        inject=inject,
        layer_size=lambda shape, _: shape[0] * shape[1],
        merges={"constrained": Merge(run=_merge_constrained, needs_base=True)},
        adapts=_adapts,
        reads_weights=True,
        fixed_noun=True,
    ),
)
