"""attach: what it starts with, what stays frozen, what is disjoint, what is refused."""

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.testing import assert_close

from sbora_diffusion.adapters.basis import Interval, Side, indices
from sbora_diffusion.adapters.layer import attach, detect
from sbora_diffusion.adapters.peft_layer import FastForward
from sbora_diffusion.utils.errors import SboraError

from .tiny import Kind, Tiny, activate, attached, dense_delta, each_kind, each_side, inject, lora, run


@each_kind
@each_side
def test_attached_adapter_changes_nothing_yet(tiny: Tiny, kind: Kind, side: Side) -> None:
    expected = run(kind, tiny.load(kind))
    model, (layers,) = attached(tiny, kind, side, trained=False)
    assert torch.equal(run(kind, model), expected)
    assert layers
    for name, layer in layers.items():
        dim = layer.module.in_features if side == "fa" else layer.module.out_features
        assert dim is not None
        assert torch.equal(layer.index, indices(name, dim, Interval(0, 4), 0))
        assert isinstance(layer.module, FastForward)
        assert not name.startswith(("base_model", "text_model"))


@each_side
def test_one_hot_factor_stays_frozen(tiny: Tiny, side: Side) -> None:
    model, (layers, _) = attached(tiny, "unet", side, "fa")
    one_hot = {name: lora(layer, frozen=True).detach().clone() for name, layer in layers.items()}
    for adapters in (["cat"], ["dog"], ["dog", "cat"]):
        activate(model, *adapters)
        for layer in layers.values():
            assert not lora(layer, frozen=True).requires_grad
            assert layer.trained.requires_grad == ("dog" in adapters)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    run("unet", model).square().mean().backward()
    optimiser.step()
    assert all(torch.equal(lora(layer, frozen=True), one_hot[name]) for name, layer in layers.items())


@pytest.mark.parametrize("kind", ["unet", "clip", "llama"])
@each_side
def test_deltas_of_two_adapters_are_orthogonal_in_every_layer(tiny: Tiny, kind: Kind, side: Side) -> None:
    _, (first, second) = attached(tiny, kind, side, side)
    assert first.keys() == second.keys()
    for name, layer in first.items():
        a, b = dense_delta(layer), dense_delta(second[name])
        product = a @ b.t() if side == "fa" else a.t() @ b
        assert product.count_nonzero() == 0
        assert (a * b).count_nonzero() == 0
        assert not set(layer.index.tolist()) & set(second[name].index.tolist())


@each_side
def test_delta_is_the_dense_one(tiny: Tiny, side: Side) -> None:
    _, (layers,) = attached(tiny, "clip", side)
    for layer in layers.values():
        dense = dense_delta(layer)
        assert_close(dense.index_select(1 if side == "fa" else 0, layer.index).float(), layer.delta().detach())


def test_attaching_again_starts_afresh(tiny: Tiny) -> None:
    model, _ = attached(tiny, "clip", "fa")
    layers = attach(model, "dog", "fb", Interval(8, 4), seed=1)
    assert torch.equal(run("clip", model), run("clip", tiny.load("clip")))
    assert all(layer.side == "fb" and type(layer.module).__mro__.count(FastForward) == 1 for layer in layers.values())
    modules = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert all(a is not b for a, b in pairwise(modules))


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model: Any = get_peft_model(nn.Sequential(nn.Linear(16, 8)), LoraConfig(r=4, target_modules=["0"]))
    (layer,) = attach(model, "default", "fb", Interval(4, 4), 0).values()
    assert torch.equal(layer.index, indices("0", 8, Interval(4, 4), 0))
    assert layer.trained.is_meta
    assert model(torch.empty(3, 16, device="meta")).shape == (3, 8)
    assert torch.equal(layer.index, indices("0", 8, Interval(4, 4), 0))
    assert detect(model, "default") == {}


def test_without_a_peft_hook_it_stays_a_dense_lora(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, (expected,) = attached(tiny, "clip", "fa")
    monkeypatch.setattr("sbora_diffusion.adapters.layer._PEFT_HOOKS", ("lora_variant", "hook_of_the_past"))
    with caplog.at_level(logging.WARNING):
        degraded, (layers,) = attached(tiny, "clip", "fa")
    assert "hook_of_the_past" in caplog.text
    assert len(caplog.records) == 1
    assert not any(isinstance(module, FastForward) for module in degraded.modules())
    assert_close(run("clip", degraded), run("clip", model), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(layers[name].delta(), expected[name].delta()) for name in expected)


def test_nothing_to_attach(tiny: Tiny) -> None:
    with pytest.raises(SboraError, match="no LoRA layer of an adapter named 'dog'"):
        attach(tiny.load("clip"), "dog", "fa", Interval(0, 4), 0)


def test_interval_must_have_the_rank_and_fit(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "dog")
    before = run("clip", model)
    with pytest.raises(SboraError, match=r"has rank 4 .* interval has 8"):
        attach(model, "dog", "fa", Interval(0, 8), 0)
    with pytest.raises(SboraError, match="interval 30:34 does not fit"):
        attach(model, "dog", "fa", Interval(30, 4), 0)
    assert not any(isinstance(module, FastForward) for module in model.modules())
    assert torch.equal(run("clip", model), before)


def test_dora_is_refused(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "dog", use_dora=True)
    with pytest.raises(SboraError, match="already has DoraLinearVariant"):
        attach(model, "dog", "fa", Interval(0, 4), 0)
    assert detect(model, "dog") == {}


def test_lora_bias_is_refused(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "dog", lora_bias=True)
    with pytest.raises(SboraError, match="already has a LoRA bias"):
        attach(model, "dog", "fa", Interval(0, 4), 0)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Embedding(9, 4)])
def test_other_layers_are_refused(layer: nn.Module) -> None:
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(SboraError, match=f"is a {type(layer).__name__}, SBoRA needs linear layers"):
        attach(model, "default", "fa", Interval(0, 4), 0)
    assert detect(model, "default") == {}


def test_a_merged_adapter_is_left_alone(tiny: Tiny) -> None:
    model, (layers,) = attached(tiny, "clip", "fa")
    for layer in layers.values():
        layer.module.merge()
    with pytest.raises(SboraError, match="is merged into layer"):
        detect(model, "dog")
    with pytest.raises(SboraError, match="is merged into layer"):
        attach(model, "dog", "fa", Interval(0, 4), 0)
