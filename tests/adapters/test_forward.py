"""Forward and backward through attached layers, against plain PEFT, in all the circumstances of a training."""

import copy
import io
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.testing import assert_close

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.layer import attach

from .tiny import (
    NAMES,
    Kind,
    Tiny,
    activate,
    attached,
    each_kind,
    inject,
    perturb,
    plain_copy,
    run,
)


@each_kind
@pytest.mark.parametrize("sides", [("fa",), ("fb",), ("fa", "fa", "fb")], ids=",".join)
def test_gradients_equal_plain_peft(tiny: Tiny, kind: Kind, sides: tuple[Side, ...]) -> None:
    model, _ = attached(tiny, kind, *sides)
    plain = plain_copy(tiny, kind, model, *NAMES[: len(sides)])
    assert_close(run(kind, model), run(kind, plain), rtol=1e-5, atol=1e-5)
    got, expected = gradients(kind, model), gradients(kind, plain)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert got.keys() == trained < expected.keys()  # plain PEFT trains the one-hot factor, too
    assert relative_error(got.values(), [expected[name] for name in got]) < 1e-5

    if kind != "llama-nf4":  # in float64 no gradient is too small to be compared on its own
        got, expected = gradients(kind, model.double()), gradients(kind, plain.double())
        for name in trained:
            assert relative_error([got[name]], [expected[name]]) < 1e-9, name


def relative_error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (got, expected))
    return float((a - b).norm() / b.norm())


def gradients(kind: Kind, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = run(kind, model)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    (output - target).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@each_kind
def test_training_mode_and_checkpointing_give_the_same_gradients(tiny: Tiny, kind: Kind) -> None:
    model, _ = attached(tiny, kind, "fa", "fb")
    expected = gradients(kind, model)
    model.train()
    model.enable_gradient_checkpointing() if kind == "unet" else model.activation_checkpointing_enable()
    got = gradients(kind, model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["unet", "llama"])
def test_the_unusual_falls_back_to_the_same_output(tiny: Tiny, kind: Kind) -> None:
    model, _ = attached(tiny, kind, "fa", "fb")
    expected = run(kind, model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            vars(module.base_layer)["_hf_hook"] = object()  # as accelerate's offloading leaves it
    assert_close(run(kind, model), expected, rtol=1e-5, atol=1e-5)


def test_dropout_gathers_first_and_is_unbiased() -> None:
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 3)), LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"]))
    (layer,) = attach(model, "default", "fa", Interval(0, 2), 0).values()
    perturb([layer.trained])
    x = torch.randn(1, 8)
    with torch.no_grad():
        base, full = model.base_model.model[0].base_layer(x), model.eval()(x)
        deltas = torch.stack([model.train()(x) - base for _ in range(4000)])
    assert len(deltas.unique(dim=0)) == 4  # each of two columns dropped or not
    assert_close(deltas.mean(0), full - base, rtol=0, atol=0.05 * float((full - base).abs().max()) + 0.01)


def test_plain_and_sbora_adapters_together(tiny: Tiny) -> None:
    model, _ = attached(tiny, "clip", "fa")
    model = inject("clip", model, "plain", init_lora_weights=False)
    activate(model, "dog", "plain")
    assert_close(run("clip", model), run("clip", plain_copy(tiny, "clip", model, "dog", "plain")), rtol=1e-5, atol=1e-5)


def test_a_trainable_base_gets_its_gradient(tiny: Tiny) -> None:
    model, (layers,) = attached(tiny, "clip", "fa")
    for layer in layers.values():
        layer.module.get_base_layer().requires_grad_(True)
    assert all("base_layer.weight" in name or "lora_" in name or "bias" in name for name in gradients("clip", model))
    assert any("base_layer.weight" in name for name in gradients("clip", model))


def test_disabled_adapters_give_the_base_model(tiny: Tiny) -> None:
    model, _ = attached(tiny, "llama", "fa", "fb")
    with model.disable_adapter():
        assert torch.equal(run("llama", model), run("llama", tiny.load("llama")))


def test_autocast_and_half_precision(tiny: Tiny) -> None:
    model, _ = attached(tiny, "unet", "fa", "fb")
    expected = run("unet", model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run("unet", model)
        got.float().square().mean().backward()
    assert_close(got.float(), expected, rtol=0, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@each_kind
def test_copies_and_pickles(tiny: Tiny, kind: Kind) -> None:
    model, (layers,) = attached(tiny, kind, "fa")
    expected = run(kind, model)
    assert torch.equal(run(kind, copy.deepcopy(model)), expected)
    layer = next(iter(layers.values())).module
    twin = pickle.loads(pickle.dumps(layer))
    assert type(twin) is type(layer)
    if kind != "llama-nf4":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        assert type(torch.load(buffer, weights_only=False)) is type(layer)


def test_a_linear4bit_that_was_repacked_has_gradients_again(tiny: Tiny) -> None:
    model = tiny.load("llama-nf4")
    with torch.no_grad():
        expected = run("llama-nf4", model)  # on a CPU with AVX512-BF16 this repacks the weights
    model = inject("llama-nf4", model, "dog")
    attach(model, "dog", "fa", Interval(0, 4), 0)
    quantised: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert quantised
    for module in quantised:
        assert not module.support_avx512bf16_for_cpu
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    with torch.no_grad():
        assert_close(run("llama-nf4", model), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert gradients("llama-nf4", model)


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_a_compiled_model_has_no_graph_break(tiny: Tiny) -> None:
    model, _ = attached(tiny, "clip", "fa", "fb")
    model.encoder.layers = model.encoder.layers[:1]
    ids = torch.randint(0, 96, (2, 7))
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(model)(ids)
    assert explanation.graph_break_count == 0
