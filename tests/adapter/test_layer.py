"""attach and detect on a UNet, a CLIP text encoder, a Llama and an nf4 Llama, against plain PEFT and dense algebra."""

import copy
import io
import logging
import pickle
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from sbora_diffusion.adapter.basis import Interval, Side, indices
from sbora_diffusion.adapter.layer import SboraLayer, attach, detect
from sbora_diffusion.adapter.variant import FastForward
from sbora_diffusion.errors import SboraError

from .tiny import KINDS, NAMES, Kind, Tiny, activate, attached, inject, perturb, run

each_kind = pytest.mark.parametrize("kind", KINDS)
each_side = pytest.mark.parametrize("side", ["fa", "fb"])


def plain_copy(tiny: Tiny, kind: Kind, model: Any, *names: str) -> Any:
    """The same adapters in plain PEFT, which multiplies by the one-hot factor."""
    plain = tiny.load(kind)
    for name in names:
        plain = inject(kind, plain, name)
    activate(plain, *names)
    for module in plain.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(model.get_parameter(name))
    assert not any(isinstance(module, FastForward) for module in plain.modules())
    return plain


def gradients(kind: Kind, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = run(kind, model)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    (output - target).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def base_weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" not in name}


def assert_same_weights(model: Any, before: dict[str, Tensor]) -> None:
    after = base_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


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


def lora(layer: SboraLayer, frozen: bool) -> Tensor:
    factor = (layer.module.lora_A if (layer.side == "fa") == frozen else layer.module.lora_B)[layer.adapter]
    assert isinstance(factor, nn.Linear)
    return factor.weight


def dense_delta(layer: SboraLayer) -> Tensor:
    """ΔW (out, in) in float64, by multiplying both factors."""
    a, b = layer.module.lora_A[layer.adapter], layer.module.lora_B[layer.adapter]
    assert isinstance(a, nn.Linear)
    assert isinstance(b, nn.Linear)
    return b.weight.detach().double() @ a.weight.detach().double() * layer.scaling


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


def test_a_linear4bit_that_was_repacked_has_gradients_again(tiny: Tiny) -> None:
    model = tiny.load("llama-nf4")
    with torch.no_grad():
        expected = run("llama-nf4", model)  # on a CPU with AVX512-BF16 this repacks the weights
    model = inject("llama-nf4", model, "dog")
    attach(model, "dog", "fa", Interval(0, 4), 0)
    quantised: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert quantised
    for module in quantised:
        assert module.support_avx512bf16_for_cpu is False
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    with torch.no_grad():
        assert_close(run("llama-nf4", model), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert gradients("llama-nf4", model)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model: Any = get_peft_model(nn.Sequential(nn.Linear(16, 8)), LoraConfig(r=4, target_modules=["0"]))
    (layer,) = attach(model, "default", "fb", Interval(4, 4), 0).values()
    assert torch.equal(layer.index, indices("0", 8, Interval(4, 4), 0))
    assert layer.trained.is_meta
    assert model(torch.empty(3, 16, device="meta")).shape == (3, 8)
    assert torch.equal(layer.index, indices("0", 8, Interval(4, 4), 0))
    assert detect(model, "default") == {}


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_a_compiled_model_has_no_graph_break(tiny: Tiny) -> None:
    model, _ = attached(tiny, "clip", "fa", "fb")
    ids = torch.randint(0, 96, (2, 7))
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(model)(ids)
    assert explanation.graph_break_count == 0


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


def test_without_a_peft_hook_it_stays_a_dense_lora(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, (expected,) = attached(tiny, "clip", "fa")
    monkeypatch.setattr("sbora_diffusion.adapter.layer._PEFT_HOOKS", ("lora_variant", "hook_of_the_past"))
    with caplog.at_level(logging.WARNING):
        degraded, (layers,) = attached(tiny, "clip", "fa")
    assert "hook_of_the_past" in caplog.text
    assert len(caplog.records) == 1
    assert not any(isinstance(module, FastForward) for module in degraded.modules())
    assert_close(run("clip", degraded), run("clip", model), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(layers[name].delta(), expected[name].delta()) for name in expected)


def test_attaching_again_starts_afresh(tiny: Tiny) -> None:
    model, _ = attached(tiny, "clip", "fa")
    layers = attach(model, "dog", "fb", Interval(8, 4), seed=1)
    assert torch.equal(run("clip", model), run("clip", tiny.load("clip")))
    assert all(layer.side == "fb" and type(layer.module).__mro__.count(FastForward) == 1 for layer in layers.values())
    modules = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert all(a is not b for a, b in pairwise(modules))
