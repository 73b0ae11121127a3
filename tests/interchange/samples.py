"""Random adapters for the layers of a model, at the ledger's columns or rows, as a training would leave them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sbora_diffusion.adapters.basis import Interval, Side, canonical, indices
from sbora_diffusion.adapters.file import Adapter, Factor, Spec

TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "text_encoder_2": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
SHAPES = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (10, 12),  # out, in
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (10, 16),
    "text_encoder.encoder.layers.0.self_attn.q_proj": (12, 8),
}
SDXL_SHAPES = SHAPES | {"text_encoder_2.encoder.layers.0.self_attn.q_proj": (14, 14)}


def layer_shapes(components: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """(out, in) of the attention's linear layers."""
    return {
        f"{component}.{canonical(name)}": (module.out_features, module.in_features)
        for component, model in components.items()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(TARGETS[component])
    }


def random_adapter(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    side: Side = "fa",
    interval: Interval | None = None,
    seed: int = 0,
    std: float = 0.3,
    vectors: int = 1,
    **changes: Any,
) -> Adapter:
    """Random numbers in all layers, and a token in every text encoder."""
    interval = interval or Interval(1, 3)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for key, (out_dim, in_dim) in shapes.items():
        index = indices(key.partition(".")[2], in_dim if side == "fa" else out_dim, interval, 0)
        size = (out_dim, interval.rank) if side == "fa" else (interval.rank, in_dim)
        factors[key] = Factor(index, torch.randn(size, generator=generator) * std)
    fields: dict[str, Any] = {
        "side": side, "rank": interval.rank, "intervals": (interval,), "seed": 0, "base_id": "tiny",
        "base_fingerprint": "f00d", "tokens": {"<dog>": "hound"}, "name": "dog", "recipe": {"steps": 7},
    }  # fmt: skip
    spec = Spec(**fields | changes)
    widths = {
        component: next((in_dim for key, (_, in_dim) in shapes.items() if key.startswith(f"{component}.")), None)
        for component in ("text_encoder", "text_encoder_2")
    }
    tokens = {
        f"{component}.{token}": torch.randn(vectors, width, generator=generator)
        for component, width in widths.items()
        for token in spec.tokens
        if width
    }
    return Adapter(spec, factors, tokens)


def assert_same(got: Adapter, expected: Adapter) -> None:
    """Bit for bit, and everything that is said about it."""
    assert got.spec == expected.spec
    assert got.factors.keys() == expected.factors.keys()
    for key, factor in expected.factors.items():
        assert torch.equal(got.factors[key].index, factor.index)
        assert torch.equal(got.factors[key].weight, factor.weight)
    assert got.tokens.keys() == expected.tokens.keys()
    assert all(torch.equal(got.tokens[key], embedding) for key, embedding in expected.tokens.items())
