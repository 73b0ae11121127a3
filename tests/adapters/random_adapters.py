"""Random adapters and specs for property tests."""

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from sbora_diffusion.adapters.basis import Interval, Side, indices
from sbora_diffusion.adapters.file import Adapter, Factor, Spec

SHAPES = {"unet.mid.to_q": (10, 12), "unet.mid.to_k": (10, 16), "text_encoder.layers.0.fc1": (14, 12)}  # out, in


def spec(**changes: Any) -> Spec:
    fields: dict[str, Any] = {
        "side": "fa",
        "rank": 3,
        "intervals": (Interval(0, 3),),
        "seed": 0,
        "base_id": "tiny",
        "base_fingerprint": "f00d",
        "tokens": {"<dog>": "dog"},
        "name": "dog",
    }
    return Spec(**fields | changes)


def adapter(
    interval: Interval | None = None,
    side: Side = "fa",
    seed: int = 0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    **changes: Any,
) -> Adapter:
    """Random numbers at an interval's columns or rows, one token embedding."""
    interval = interval or Interval(0, 3)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for key, (out_dim, in_dim) in shapes.items():
        index = indices(key, in_dim if side == "fa" else out_dim, interval, 0)
        size = (out_dim, interval.rank) if side == "fa" else (interval.rank, in_dim)
        factors[key] = Factor(index, torch.randn(size, generator=generator))
    adapter_spec = spec(side=side, rank=interval.rank, intervals=(interval,), **changes)
    tokens = {f"text_encoder.{token}": torch.randn(1, 8, generator=generator) for token in adapter_spec.tokens}
    return Adapter(adapter_spec, factors, tokens)


def dense(factor: Factor, side: Side, shape: tuple[int, int]) -> torch.Tensor:
    """ΔW (out, in) in float64."""
    delta = torch.zeros(shape, dtype=torch.float64)
    return delta.index_add_(1 if side == "fa" else 0, factor.index, factor.weight.double())


sides = st.sampled_from(["fa", "fb"])
free_intervals = st.builds(Interval, st.integers(0, 6), st.integers(1, 4))
