"""In-place training: outputs and gradients of the dense formula, and base weights that come back bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.inplace_training import inplace_training
from sbora_diffusion.adapters.layer import SboraLayer

from .inplace_case import Case
from .tiny import Kind, Tiny, attached, dense_delta, each_side, run

FLOATS: list[Kind] = ["unet", "clip", "llama"]


@settings(max_examples=40, deadline=None)
@given(
    side=st.sampled_from(["fa", "fb"]),
    bias=st.booleans(),
    alpha=st.sampled_from([3, 6]),
    leading=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_are_the_dense_ones(
    side: Side, bias: bool, alpha: int, leading: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    case = Case(side, bias, alpha)
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, case.layer.trained]
    with inplace_training(case.model, "default") as names:
        y, expected = case.model(x), case.dense(x)
        upstream = torch.randn_like(expected)
        got = torch.autograd.grad(y, inputs, upstream)
    assert len(names) == 1
    assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for gradient, reference in zip(got, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert_close(gradient, reference, rtol=1e-12, atol=1e-12)
    assert torch.equal(case.base.weight, case.original)


@each_side
@pytest.mark.parametrize("kind", FLOATS)
def test_a_training_is_that_of_the_fused_kernel_and_leaves_no_trace(tiny: Tiny, kind: Kind, side: Side) -> None:
    fused, (fused_layers,) = attached(tiny, kind, side, trained=False)
    inplaced, (inplace_layers,) = attached(tiny, kind, side, trained=False)
    before = base_weights(inplace_layers)
    with inplace_training(inplaced, "dog") as names:
        assert len(names) == len(inplace_layers)
        for model, layers in ((fused, fused_layers), (inplaced, inplace_layers)):
            optimizer = torch.optim.SGD([layer.trained for layer in layers.values()], lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                run(kind, model.train(), seed=step).square().mean().backward()
                optimizer.step()
        assert not same(before, base_weights(inplace_layers))
    assert same(before, base_weights(inplace_layers))
    for name, layer in fused_layers.items():
        assert layer.trained.abs().max() > 0
        assert_close(inplace_layers[name].trained, layer.trained, rtol=1e-3, atol=1e-6)


@each_side
def test_a_half_factor_does_not_round_a_float_weight(side: Side) -> None:
    case = Case(side, bias=False, dtype=torch.float32)
    case.layer.trained.data = case.layer.trained.data.bfloat16()
    with inplace_training(case.model, "default"):
        case.model(torch.randn(4, 12))
        assert torch.equal(case.base.weight, (case.original.double() + dense_delta(case.layer)).float())
    assert torch.equal(case.base.weight, case.original)


@each_side
def test_half_weights_hold_what_a_merge_would_write(side: Side) -> None:
    case = Case(side, bias=False, alpha=6, dtype=torch.bfloat16)
    case.layer.trained.data = case.layer.trained.data.float()  # the master copy
    x = torch.randn(64, 12, dtype=torch.bfloat16, requires_grad=True)
    with inplace_training(case.model, "default"):
        y = case.model(x)
        assert torch.equal(case.base.weight, (case.original.double() + dense_delta(case.layer)).bfloat16())
        y.float().square().mean().backward()
    assert case.layer.trained.grad is not None
    assert case.layer.trained.grad.dtype == torch.float32


@each_side
def test_what_runs_without_the_adapter_sees_the_original_weights(tiny: Tiny, side: Side) -> None:
    model, (layers,) = attached(tiny, "llama", side)
    base, expected = run("llama", tiny.load("llama")), run("llama", model)
    with inplace_training(model, "dog"):
        assert_close(run("llama", model), expected, rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(run("llama", model), base)
        assert_close(run("llama", model), expected, rtol=1e-5, atol=1e-5)
        before = base_weights(layers)
        model.merge_adapter()
        assert_close(run("llama", model), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert not same(before, base_weights(layers))
    assert same(base_weights(layers), {name: tiny.load("llama").get_parameter(f"{name}.weight") for name in layers})


@each_side
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(side: Side, use_reentrant: bool) -> None:
    case = Case(side)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    with inplace_training(case.model, "default"):
        y = checkpoint(case.model, x, use_reentrant=use_reentrant)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
    expected = torch.autograd.grad(case.dense(x).square().sum(), [x, case.layer.trained])
    for tensor, reference in zip([x, case.layer.trained], expected, strict=True):
        assert tensor.grad is not None
        assert_close(tensor.grad, reference, rtol=1e-12, atol=1e-12)


@each_side
def test_autocast(side: Side) -> None:
    case = Case(side, dtype=torch.float32)
    x = torch.randn(64, 12, requires_grad=True)
    with inplace_training(case.model, "default"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.model(x)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    expected = torch.autograd.grad(case.dense(x).square().mean(), [x, case.layer.trained])
    for tensor, reference in zip([x, case.layer.trained], expected, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad, reference, rtol=0, atol=0.03 * float(reference.abs().max()))


def test_fa_keeps_the_gathered_columns_only() -> None:
    case = Case("fa")
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with (
        inplace_training(case.model, "default"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        case.model(torch.randn(64, 12, dtype=torch.float64))
    assert sorted(kept) == [(3,), (10, 3), (64, 3)]


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_compiled_layers_use_the_fused_kernel_without_a_graph_break() -> None:
    case = Case("fa")
    x = torch.randn(2, 12, dtype=torch.float64)
    compiled = torch.compile(case.model, backend="aot_eager", fullgraph=True)
    with inplace_training(case.model, "default"):
        assert_close(compiled(x), case.dense(x), rtol=1e-12, atol=1e-12)
        case.model(x)
        assert_close(compiled(x), case.dense(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(case.base.weight, case.original)


def base_weights(layers: dict[str, SboraLayer]) -> dict[str, Tensor]:
    modules: dict[str, Any] = {name: layer.module.get_base_layer() for name, layer in layers.items()}
    return {name: base.weight.detach().clone() for name, base in modules.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
