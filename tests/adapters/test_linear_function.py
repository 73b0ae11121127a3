"""The autograd Function against dense algebra: values, gradients, dtypes, and what it keeps in memory."""

import shutil
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from sbora_diffusion.adapters.linear_function import sbora_linear

SIDES = [("fa",), ("fb",), ("fa", "fb")]


class Case:
    """A frozen linear layer, adapters on it, and the same layer with a dense delta."""

    def __init__(self, sides: tuple[str, ...], dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        self.base = nn.Linear(12, 10, bias=bias, dtype=dtype).requires_grad_(False)
        self.fa_index = torch.tensor([7, 0, 4]) if "fa" in sides else None
        self.fb_index = torch.tensor([9, 2]) if "fb" in sides else None
        self.fa_weight = torch.randn(10, 3, dtype=dtype).requires_grad_() if "fa" in sides else None
        self.fb_weight = torch.randn(2, 12, dtype=dtype).requires_grad_() if "fb" in sides else None

    @property
    def weights(self) -> list[Tensor]:
        return [weight for weight in (self.fa_weight, self.fb_weight) if weight is not None]

    def fast(self, x: Tensor) -> Tensor:
        return sbora_linear(x, self.base, self.fa_index, self.fa_weight, self.fb_index, self.fb_weight)

    def dense(self, x: Tensor) -> Tensor:
        weight = self.base.weight
        if self.fa_weight is not None and self.fa_index is not None:
            weight = weight + self.fa_weight @ nn.functional.one_hot(self.fa_index, 12).to(weight)
        if self.fb_weight is not None and self.fb_index is not None:
            weight = weight + nn.functional.one_hot(self.fb_index, 10).to(weight).t() @ self.fb_weight
        return nn.functional.linear(x, weight, self.base.bias)

    def saved(self, x: Tensor) -> list[tuple[int, ...]]:
        """Shapes of what a forward pass keeps for its backward pass, the base weight left out."""
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.fast(x)
        return [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() != self.base.weight.data_ptr()]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIDES), st.booleans(), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 999))
def test_values_and_gradients_are_the_dense_ones(
    sides: tuple[str, ...], bias: bool, leading: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    case = Case(sides, torch.float64, bias)
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    fast, dense = case.fast(x), case.dense(x)
    assert_close(fast, dense, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(dense)
    inputs = [x, *case.weights]
    for got, expected in zip(
        torch.autograd.grad(fast, inputs, upstream), torch.autograd.grad(dense, inputs, upstream), strict=True
    ):
        assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", SIDES)
def test_gradients_are_derivatives(sides: tuple[str, ...]) -> None:
    case = Case(sides, torch.float64)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        rest = list(weights)
        fa = rest.pop(0) if case.fa_weight is not None else None
        fb = rest.pop(0) if case.fb_weight is not None else None
        return sbora_linear(x, case.base, case.fa_index, fa, case.fb_index, fb)

    assert torch.autograd.gradcheck(function, (x, *case.weights))


def test_repeated_indices_add_up() -> None:
    case = Case(("fa", "fb"), torch.float64)
    case.fa_index, case.fb_index = torch.tensor([3, 3, 1]), torch.tensor([5, 5])
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    assert_close(case.fast(x), case.dense(x), rtol=1e-12, atol=1e-12)
    fast = torch.autograd.grad(case.fast(x).square().sum(), x)
    assert_close(fast, torch.autograd.grad(case.dense(x).square().sum(), x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", SIDES)
def test_non_contiguous_input(sides: tuple[str, ...]) -> None:
    case = Case(sides, torch.float64)
    x = torch.randn(12, 5, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    assert_close(case.fast(x), case.dense(x), rtol=1e-12, atol=1e-12)


def test_fa_keeps_the_gathered_columns_only() -> None:
    x = torch.randn(64, 12)
    assert sorted(Case(("fa",)).saved(x)) == [(3,), (64, 3)]
    assert sorted(Case(("fa",)).saved(x.requires_grad_())) == [(3,), (10, 3), (64, 3)]


def test_fb_keeps_the_input() -> None:
    assert sorted(Case(("fb",)).saved(torch.randn(64, 12))) == [(2,), (64, 12)]


def test_frozen_adapters_keep_no_activation() -> None:
    case = Case(("fa", "fb"))
    for weight in case.weights:
        weight.requires_grad_(False)
    assert sorted(case.saved(torch.randn(64, 12, requires_grad=True))) == [(2,), (2, 12), (3,), (10, 3)]
    assert not case.fast(torch.randn(64, 12)).requires_grad


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_over_a_float32_base(sides: tuple[str, ...], backward_inside: bool) -> None:
    case = Case(sides)
    x = torch.randn(64, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.fast(x)
        loss = y.float().square().mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert y.dtype == torch.bfloat16
    got = [x.grad, *(weight.grad for weight in case.weights)]
    expected = torch.autograd.grad(case.dense(x).square().mean(), [x, *case.weights])
    for gradient, reference in zip(got, expected, strict=True):
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert_close(gradient, reference, rtol=0, atol=0.03 * float(reference.detach().abs().max()))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_half_base(sides: tuple[str, ...], dtype: torch.dtype) -> None:
    case = Case(sides)
    x = torch.randn(16, 12)
    expected = case.dense(x)
    case.base.to(dtype)
    y = case.fast(x.to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype
    assert_close(y.float(), expected, rtol=0, atol=0.06)
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in case.weights)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    case = Case(("fa", "fb"))
    x = torch.randn(5, 12, requires_grad=True)
    y = checkpoint(case.fast, x, use_reentrant=use_reentrant)
    assert isinstance(y, Tensor)
    got = torch.autograd.grad(y.square().sum(), x) if not use_reentrant else None
    y = checkpoint(case.fast, x, use_reentrant=use_reentrant)
    assert isinstance(y, Tensor)
    y.square().sum().backward()
    expected = torch.autograd.grad(case.fast(x).square().sum(), [x, *case.weights])
    for tensor, reference in zip([x, *case.weights], expected, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, reference)
    assert got is None or torch.equal(got[0], expected[0])


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    case = Case(("fa",))
    x = torch.randn(5, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(case.fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_base_weight_that_changed_before_backward_is_noticed() -> None:
    case = Case(("fa",))
    y = case.fast(torch.randn(5, 12, requires_grad=True))
    with torch.no_grad():
        case.base.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("sides", SIDES)
def test_compiles_without_graph_break(sides: tuple[str, ...]) -> None:
    case = Case(sides)
    x = torch.randn(5, 12, requires_grad=True)
    compiled = torch.compile(case.fast, backend="aot_eager", fullgraph=True)
    inputs = [x, *case.weights]
    got, expected = compiled(x), case.fast(x)
    assert torch.equal(got, expected)
    for gradient, reference in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert_close(gradient, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_compiled_code_gives_the_same_gradients() -> None:
    case = Case(("fa", "fb"))
    x = torch.randn(5, 12, requires_grad=True)
    inputs = [x, *case.weights]
    compiled = torch.compile(case.fast, fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), inputs)
    expected = torch.autograd.grad(case.fast(x).square().sum(), inputs)
    for gradient, reference in zip(got, expected, strict=True):
        assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_nf4_base(sides: tuple[str, ...], dtype: torch.dtype, training: bool) -> None:
    base: Any = Linear4bit(64, 10, quant_type="nf4", compute_dtype=dtype).to("cpu").train(training)
    base.support_avx512bf16_for_cpu = False
    dense = dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)
    case = Case(sides, dtype)
    if case.fb_weight is not None:
        case.fb_weight = torch.randn(2, 64, dtype=dtype).requires_grad_()
    x = torch.randn(6, 64, dtype=dtype, requires_grad=True)
    y = sbora_linear(x, base, case.fa_index, case.fa_weight, case.fb_index, case.fb_weight)
    y.float().square().sum().backward()
    got = [y, x.grad, *(weight.grad for weight in case.weights)]

    plain = nn.Linear(64, 10, dtype=dtype)
    plain.weight.data, plain.bias.data = dense, base.bias.data.to(dtype)
    expected_y = sbora_linear(
        x, plain.requires_grad_(False), case.fa_index, case.fa_weight, case.fb_index, case.fb_weight
    )
    expected = [expected_y, *torch.autograd.grad(expected_y.float().square().sum(), [x, *case.weights])]
    for gradient, reference in zip(got, expected, strict=True):
        assert gradient is not None
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert_close(gradient, reference, rtol=0, atol=tolerance * float(reference.detach().abs().max()))
