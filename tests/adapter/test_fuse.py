"""Merging into the base weights through PEFT and diffusers, and unmerging bit for bit."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from sbora_diffusion.adapter.basis import Interval, Side
from sbora_diffusion.adapter.layer import attach
from sbora_diffusion.errors import SboraError

from .tiny import Kind, Tiny, attached, dense_delta, each_kind, each_side, perturb, run


@each_kind
def test_merging_into_the_weights(tiny: Tiny, kind: Kind) -> None:
    model, (layers, others) = attached(tiny, kind, "fa", "fb")
    before, expected = base_weights(model), run(kind, model)
    modules = [layer.module for layer in layers.values()]
    if kind == "llama-nf4":
        with pytest.warns(UserWarning, match="rounding errors"), pytest.raises(SboraError, match="quantised"):
            modules[0].merge()
        return
    for safe in (False, True):
        for module in modules:
            module.merge(safe_merge=safe)
        assert_close(run(kind, model), expected, rtol=1e-4, atol=1e-4)
        for name, layer in layers.items():
            weight = layer.module.get_base_layer().weight
            original = before[next(key for key in before if key.endswith(f"{name}.base_layer.weight"))]
            dense = original.double() + dense_delta(layer) + dense_delta(others[name])
            assert_close(weight.double(), dense, rtol=1e-6, atol=1e-6)
        for module in modules:
            module.unmerge()
        assert_same_weights(model, before)


def test_merge_order_does_not_matter(tiny: Tiny) -> None:
    merged = []
    for order in (["dog", "cat"], ["cat", "dog"]):
        model, (layers, _) = attached(tiny, "unet", "fa", "fa")
        for layer in layers.values():
            layer.module.merge(adapter_names=order)
        merged.append(base_weights(model))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unfuse_is_exact_whatever_happened_to_the_scale(tiny: Tiny, dtype: torch.dtype) -> None:
    model, _ = attached(tiny, "unet", "fa", "fb")
    model.to(dtype)
    before = base_weights(model)
    model.fuse_lora(lora_scale=0.7, adapter_names=["dog", "cat"])
    assert not all(torch.equal(base_weights(model)[name], before[name]) for name in before)
    model.set_adapters(["dog", "cat"], [1.0, 1.0])
    model.unfuse_lora()
    assert_same_weights(model, before)


def test_merge_and_unload_gives_a_plain_model(tiny: Tiny) -> None:
    model, _ = attached(tiny, "llama", "fa")
    expected = run("llama", model)
    assert_close(run("llama", model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@each_side
def test_transposed_weights(side: Side) -> None:
    model: Any = get_peft_model(nn.Sequential(Conv1D(6, 8)), LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))
    (layer,) = attach(model, "default", side, Interval(0, 2), 0).values()
    perturb([layer.trained])
    x = torch.randn(3, 8)
    expected, before = model(x), base_weights(model)
    layer.module.merge()
    assert_close(model(x), expected)
    layer.module.unmerge()
    assert_same_weights(model, before)


def base_weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" not in name}


def assert_same_weights(model: Any, before: dict[str, Tensor]) -> None:
    after = base_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
