"""detect: one-hot factors in adapters that somebody else loaded, concatenated or swapped."""

import pytest
import torch
from torch.testing import assert_close

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.layer import detect

from .tiny import Kind, Tiny, activate, attached, each_kind, each_side, inject, lora, perturb, plain_copy, run


@each_kind
@each_side
def test_detect_recognises_what_plain_peft_loaded(tiny: Tiny, kind: Kind, side: Side) -> None:
    model, (layers,) = attached(tiny, kind, side)
    foreign = plain_copy(tiny, kind, model, "dog")
    found = detect(foreign, "dog")
    assert found.keys() == layers.keys()
    for name, layer in found.items():
        assert layer.side == side
        assert torch.equal(layer.index, layers[name].index)
        assert torch.equal(layer.trained, layers[name].trained)
        assert not lora(layer, frozen=True).requires_grad
    assert torch.equal(run(kind, foreign), run(kind, model))


def test_detect_finds_nothing_in_a_dense_lora(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "dog", init_lora_weights=False)
    expected = run("clip", model)
    assert detect(model, "dog") == {}
    assert detect(model, "other") == {}
    assert torch.equal(run("clip", model), expected)


@pytest.mark.parametrize("weights", [[1.0, 0.5, 1.0], [-2.0, 0.25, 3.0]])
def test_detect_folds_the_scale_of_a_concatenation(tiny: Tiny, weights: list[float]) -> None:
    model, adapters = attached(tiny, "llama", "fa", "fa", "fa", rank=4)
    model.base_model.add_weighted_adapter(["dog", "cat", "fox"], weights, "all", combination_type="cat")
    model.base_model.set_adapter("all")
    expected = run("llama", model)
    found = detect(model, "all")
    assert found.keys() == adapters[0].keys()
    for name, layer in found.items():
        assert torch.equal(layer.index, torch.cat([layers[name].index for layers in adapters]))
        deltas = [layers[name].delta() * weight for layers, weight in zip(adapters, weights, strict=True)]
        assert_close(layer.delta(), torch.cat(deltas, dim=1))
    assert_close(run("llama", model), expected, rtol=1e-5, atol=1e-6)


def test_concatenation_over_shared_columns_stays_dense(tiny: Tiny) -> None:
    model, _ = attached(tiny, "llama", "fa")
    model.base_model.add_weighted_adapter(["dog", "dog"], [1.0, 1.0], "twice", combination_type="cat")
    assert detect(model, "twice") == {}


def test_detect_after_a_hot_swap(tiny: Tiny) -> None:
    model, (layers, others) = attached(tiny, "clip", "fa", "fb")
    activate(model, "cat")
    expected = run("clip", model)
    activate(model, "dog")
    with torch.no_grad():
        for name, layer in layers.items():
            for frozen in (True, False):
                a_or_b = lora(layer, frozen)
                a_or_b.copy_(lora(others[name], frozen=not frozen))  # the other side: A is trained, B is one-hot
    found = detect(model, "dog")
    assert all(layer.side == "fb" for layer in found.values())
    assert torch.equal(run("clip", model), expected)
    activate(model, "dog")
    assert all(layer.trained.requires_grad and not lora(layer, frozen=True).requires_grad for layer in found.values())


def test_a_dense_hot_swap_becomes_plain_lora(tiny: Tiny) -> None:
    model, (layers,) = attached(tiny, "clip", "fa")
    perturb((lora(layer, frozen=True) for layer in layers.values()), std=0.5)
    assert detect(model, "dog") == {}
    assert torch.equal(run("clip", model), run("clip", plain_copy(tiny, "clip", model, "dog")))
    activate(model, "dog")
    assert all(lora(layer, frozen=True).requires_grad for layer in layers.values())
