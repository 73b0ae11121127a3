"""What SBoRA relies on inside PEFT, diffusers and transformers. If an upgrade breaks one of these, read variant.py."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.testing import assert_close

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.layer import detect
from sbora_diffusion.adapters.peft_layer import FastForward, SboraVariant

from .tiny import KINDS, NAMES, Kind, Tiny, activate, attached, run


def test_our_variant_has_every_method_of_a_lora_variant() -> None:
    methods = {name for name in vars(LoraVariant) if not name.startswith("_")}
    assert methods == {"supports_lora_conversion", "init", "merge_safe", "merge_unsafe", "unmerge", "forward"}
    assert methods == {name for name, member in vars(SboraVariant).items() if callable(member) and name in methods}


@pytest.mark.parametrize("method", ["merge_safe", "merge_unsafe", "unmerge", "forward"])
def test_signatures(method: str) -> None:
    theirs = list(inspect.signature(getattr(LoraVariant, method)).parameters)
    ours = list(inspect.signature(getattr(SboraVariant, method)).parameters)
    assert ours == ["self", *theirs]


def test_frozen_names_are_a_class_default_and_the_slot_belongs_to_the_instance() -> None:
    assert BaseTunerLayer.frozen_peft_weight_names == {}
    assert not hasattr(LoraLayer, "lora_variant")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["fa", "fb"])
def test_frozen_names_hold_through_every_switch(tiny: Tiny, kind: Kind, side: Side) -> None:
    model, adapters = attached(tiny, kind, side, "fa")
    frozen = {"fa": "lora_A", "fb": "lora_B"}
    switches: list[Callable[[], Any]] = [
        lambda: activate(model, "cat"),
        lambda: activate(model, "dog"),
        lambda: activate(model, "dog", "cat"),
    ]
    if kind == "unet":
        switches += [
            model.disable_adapters,
            model.enable_adapters,
            lambda: model.set_adapters(["dog", "cat"], [0.5, 2.0]),
        ]
    for switch in switches:
        switch()
        for adapter, layers in zip(NAMES, adapters, strict=False):
            for layer in layers.values():
                name = frozen[layer.side]
                assert layer.module.frozen_peft_weight_names[adapter] == (name,)
                assert not getattr(layer.module, name)[adapter].weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_peft_consults_the_slot(tiny: Tiny, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (layers,) = attached(tiny, kind, "fa")
    plain = Linear4bit if kind == "llama-nf4" else Linear
    assert all(type(layer.module).__mro__[1:3] == (FastForward, plain) for layer in layers.values())
    fast = run(kind, model)
    calls = count_calls(monkeypatch, "forward")
    assert torch.equal(run(kind, model), fast)
    assert calls == []
    monkeypatch.setattr("sbora_diffusion.adapters.peft_layer._is_supported", lambda *_: False)
    assert_close(run(kind, model), fast, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(layers)


def count_calls(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    calls: list[str] = []
    original = getattr(SboraVariant, method)

    def counting(self: SboraVariant, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SboraVariant, method, counting)
    return calls


@pytest.mark.parametrize(("safe", "method"), [(True, "merge_safe"), (False, "merge_unsafe")])
def test_peft_merges_through_the_slot(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, safe: bool, method: str) -> None:
    _, (layers,) = attached(tiny, "clip", "fa")
    merges, unmerges = count_calls(monkeypatch, method), count_calls(monkeypatch, "unmerge")
    for layer in layers.values():
        layer.module.merge(safe_merge=safe)
        layer.module.unmerge()
    assert len(merges) == len(unmerges) == len(layers)


@pytest.mark.parametrize("kind", ["llama", "llama-nf4"])
def test_mixed_batches(tiny: Tiny, kind: Kind) -> None:
    model, _ = attached(tiny, kind, "fa", "fb")
    ids = torch.randint(0, 96, (3, 7))
    expected = []
    for names in (["dog"], ["cat"]):
        activate(model, *names)
        expected.append(model(ids).logits)
    with model.disable_adapter():
        expected.append(model(ids).logits)
    mixed = model(ids, adapter_names=["dog", "cat", "__base__"]).logits
    for row, logits in enumerate(expected):
        assert_close(mixed[row], logits[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_a_peft_folder_carries_it(tiny: Tiny, tmp_path: Path, side: Side) -> None:
    model, (layers,) = attached(tiny, "llama", side)
    expected = run("llama", model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.load("llama"), tmp_path / "dog", adapter_name="dog")
    assert_close(run("llama", loaded), expected, rtol=1e-5, atol=1e-5)
    assert detect(loaded, "dog").keys() == layers.keys()
    assert torch.equal(run("llama", loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_diffusers_carries_it_and_hot_swaps_it(tiny: Tiny, tmp_path: Path, side: Side) -> None:
    model, (layers, _) = attached(tiny, "unet", side, side)
    outputs: list[Tensor] = []
    for name in ("dog", "cat"):
        activate(model, name)
        outputs.append(run("unet", model))
        model.save_lora_adapter(tmp_path / name, adapter_name=name)
    fresh = tiny.load("unet")
    file = "pytorch_lora_weights.safetensors"
    fresh.load_lora_adapter(tmp_path / "dog", prefix=None, weight_name=file, adapter_name="dog")
    assert_close(run("unet", fresh), outputs[0], rtol=1e-5, atol=1e-5)
    assert detect(fresh, "dog").keys() == layers.keys()
    assert torch.equal(run("unet", fresh), outputs[0])

    fresh.load_lora_adapter(tmp_path / "cat", prefix=None, weight_name=file, adapter_name="dog", hotswap=True)
    assert detect(fresh, "dog").keys() == layers.keys()
    assert_close(run("unet", fresh), outputs[1], rtol=1e-6, atol=1e-6)


def test_deleting_an_adapter_leaves_nothing(tiny: Tiny) -> None:
    model, (layers, others) = attached(tiny, "unet", "fa", "fb")
    model.delete_adapters("dog")
    for layer in layers.values():
        assert "dog" not in layer.module.lora_variant
        assert "dog" not in layer.module.frozen_peft_weight_names
        assert layer.module.frozen_peft_weight_names == {"cat": ("lora_B",)}
    activate(model, "cat")
    assert all(layer.trained.requires_grad for layer in others.values())
    model.unload_lora()
    assert torch.equal(run("unet", model), run("unet", tiny.load("unet")))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_the_scale_is_read_at_every_forward(tiny: Tiny) -> None:
    model, (layers,) = attached(tiny, "unet", "fa")
    base = run("unet", tiny.load("unet"))
    model.set_adapters("dog", 0.0)
    assert torch.equal(run("unet", model), base)
    model.set_adapters("dog", 0.5)
    assert {layer.scaling for layer in layers.values()} == {1.0}  # alpha 8, rank 4


def test_a_layer_without_the_kernel_is_a_plain_linear_layer(tiny: Tiny) -> None:
    for kind in KINDS:
        model = tiny.load(kind)
        forward = nn.Linear.forward
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        assert linears
        assert all(type(linear).forward is forward for linear in linears) == (kind != "llama-nf4")
