"""Adapters of any method as what can be written into weights: columns or rows."""

from collections.abc import Mapping

import torch
from torch import nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.adapters.linear_function import full_weight


def written_side(adapter: Adapter) -> Side:
    """What `written_factors` gives: columns, or an SBoRA-FB's rows."""
    return "fa" if adapter.dense else adapter.spec.side


def written_factors(adapter: Adapter, layers: Mapping[str, nn.Linear]) -> dict[str, Factor]:
    """Its columns or rows; of a change of whole weights, all columns.

    Args:
        layers: "<component>.<canonical layer>" -> layer, with nothing written into it (DoRA reads its weight).
    """
    changes = {key: dense.delta(full_weight(layers[key].weight)) for key, dense in adapter.dense.items()}
    return adapter.factors | {key: Factor(torch.arange(delta.shape[1]), delta) for key, delta in changes.items()}


def needs_original(adapter: Adapter) -> bool:
    """Whether what it adds depends on the base weight."""
    return any(dense.magnitude is not None for dense in adapter.dense.values())
