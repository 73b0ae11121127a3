"""Adapters that are live together: joined once, and anew after every change that can be noticed."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.peft_layer import FactorCache, ScaledFactor

from .tiny import Tiny, activate, attached, each_side, plain_copy, run


def parts(side: Side, count: int = 3) -> list[ScaledFactor]:
    shape = (5, 2) if side == "fa" else (2, 5)
    return [
        ScaledFactor(torch.randperm(7)[:2], nn.Parameter(torch.randn(shape), requires_grad=False), 1.0 + number % 2)
        for number in range(count)
    ]


def joined_anew(side: Side, given_parts: list[ScaledFactor]) -> tuple[Tensor, Tensor]:
    scaled = [part.factor.detach() * part.scaling for part in given_parts]
    return torch.cat([part.index for part in given_parts]), torch.cat(scaled, 1 if side == "fa" else 0)


def is_right(joiner: FactorCache, side: Side, given_parts: list[ScaledFactor]) -> bool:
    (index, weight), expected = joiner(given_parts), joined_anew(side, given_parts)
    assert index is not None
    assert weight is not None
    return torch.equal(index, expected[0]) and torch.equal(weight, expected[1])


@each_side
@torch.no_grad()
def test_unchanged_factors_are_concatenated_once(side: Side) -> None:
    joiner, given_parts = FactorCache(side), parts(side)
    assert is_right(joiner, side, given_parts)
    assert joiner(given_parts)[1] is joiner([ScaledFactor(p.index, p.factor, p.scaling) for p in given_parts])[1]


def multiply(part: ScaledFactor) -> ScaledFactor:
    part.factor.mul_(2)
    return part


def replace_data(part: ScaledFactor) -> ScaledFactor:
    part.factor.data = part.factor.data + 1
    return part


CHANGES: dict[str, Callable[[ScaledFactor], ScaledFactor]] = {
    "in place": multiply,
    "its data replaced": replace_data,
    "another scaling": lambda part: ScaledFactor(part.index, part.factor, 0.3),
    "another index": lambda part: ScaledFactor(part.index.flip(0), part.factor, part.scaling),
    "another factor": lambda part: ScaledFactor(part.index, part.factor.clone(), part.scaling),
}


@settings(max_examples=60, deadline=None)
@given(
    side=st.sampled_from(["fa", "fb"]),
    changes=st.lists(st.tuples(st.sampled_from(list(CHANGES)), st.integers(0, 2)), max_size=6),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_every_change_is_noticed(side: Side, changes: list[tuple[str, int]], seed: int) -> None:
    torch.manual_seed(seed)
    joiner, given_parts = FactorCache(side), parts(side)
    assert is_right(joiner, side, given_parts)
    for change, number in changes:
        given_parts[number] = CHANGES[change](given_parts[number])
        assert is_right(joiner, side, given_parts)
    assert is_right(joiner, side, given_parts[:2])
    assert is_right(joiner, side, given_parts[::-1])


@each_side
def test_gradients_bypass_the_cache(side: Side) -> None:
    joiner, given_parts = FactorCache(side), parts(side)
    for part in given_parts:
        part.factor.requires_grad_(True)
    with torch.no_grad():
        joiner(given_parts)
    weight = joiner(given_parts)[1]
    assert weight is not None
    weight.sum().backward()
    for part in given_parts:
        assert part.factor.grad is not None
        assert torch.equal(part.factor.grad, torch.full_like(part.factor, part.scaling))


@torch.inference_mode()
def test_factors_without_a_version_are_joined_every_time() -> None:
    joiner, given_parts = FactorCache("fa"), parts("fa")
    assert is_right(joiner, "fa", given_parts)
    given_parts[0].factor.mul_(2)
    assert is_right(joiner, "fa", given_parts)


@each_side
@torch.no_grad()
def test_live_concepts_follow_every_change(tiny: Tiny, side: Side) -> None:
    model, layers = attached(tiny, "clip", side, side, side)
    names = ("dog", "cat", "fox")

    def check() -> None:
        expected = run("clip", plain_copy(tiny, "clip", model, *names))
        torch.testing.assert_close(run("clip", model), expected, rtol=1e-5, atol=1e-5)

    check()
    for layer in layers[1].values():
        layer.trained.mul_(-3)
    check()
    twin = copy.deepcopy(model)
    for layer in layers[2].values():
        layer.trained.zero_()
    check()
    assert not torch.equal(run("clip", twin), run("clip", model))
    activate(model, "fox", "dog")
    activate(model, *names)
    check()


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_join(count: int) -> None:
    given_parts = parts("fa", count)
    index, weight = FactorCache("fa")(given_parts)
    assert (index is None) == (weight is None) == (not given_parts)
    assert not given_parts or weight is given_parts[0].factor
