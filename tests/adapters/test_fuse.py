"""Fusion: the optimum, its limits, against a dense least-squares solve and against LBFGS, and its contract."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbora_diffusion.adapters.baseline_merges import gradient_fusion
from sbora_diffusion.adapters.basis import Interval, Side, Spec, indices
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.adapters.fuse import full_support, fuse, objective
from sbora_diffusion.adapters.merge import merge

KEY, OUT, IN, RANK = "unet.a", 5, 12, 2
TINY = 1e-9  # a ridge that does not matter


def an_adapter(number: int, side: Side, generator: torch.Generator, key: str = KEY) -> Adapter:
    """A concept of RANK columns or rows of its own."""
    interval = Interval(number * RANK, RANK)
    index = indices(key.split(".")[1], IN if side == "fa" else OUT, interval, 0).sort().values
    weight = torch.randn((OUT, RANK) if side == "fa" else (RANK, IN), generator=generator)
    spec = Spec(
        name=f"c{number}",
        side=side,
        rank=RANK,
        intervals=(interval,),
        seed=0,
        base_id="tiny",
        base_fingerprint="0" * 16,
        tokens={f"<c{number}>": "thing"},
    )
    return Adapter(spec, {key: Factor(index, weight)}, {f"text_encoder.<c{number}>": torch.zeros(4)})


class Seen:
    """Moments of made-up inputs, some of them of low rank, full matrices of which fuse asks for a part."""

    def __init__(self, names: Sequence[str], generator: torch.Generator, count: int = 30) -> None:
        self.inputs = {name: torch.randn(count, IN, generator=generator).double() + 0.5 for name in [*names, "prior"]}
        self.asked: list[str] = []

    def full(self, name: str) -> Tensor:
        x = self.inputs[name]
        return x.T @ x / len(x)

    def __call__(self, adapter: Adapter | None, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.asked.append(adapter.spec.name if adapter else "prior")
        return {key: self.full(self.asked[-1])[index][:, index] for key, index in columns.items()}


def dense(adapter: Adapter) -> Tensor:
    """(OUT, IN) float64."""
    factor, delta = adapter.factors[KEY], torch.zeros(OUT, IN, dtype=torch.float64)
    delta[(slice(None), factor.index) if adapter.spec.side == "fa" else factor.index] = factor.weight.double()
    return delta


def problem(seed: int, side: Side, count: int = 2, inputs: int = 30) -> tuple[list[Adapter], Seen]:
    generator = torch.Generator().manual_seed(seed)
    adapters = [an_adapter(number, side, generator) for number in range(count)]
    return adapters, Seen([adapter.spec.name for adapter in adapters], generator, inputs)


def value(delta: Tensor, adapters: Sequence[Adapter], seen: Seen, prior_weight: float) -> float:
    """The objective, from the inputs themselves."""
    total = prior_weight * (seen.inputs["prior"] @ delta.T).pow(2).sum(1).mean()
    for adapter in adapters:
        total = total + (seen.inputs[adapter.spec.name] @ (delta - dense(adapter)).T).pow(2).sum(1).mean()
    return total.item()


@pytest.mark.parametrize("side", ["fa", "fb"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), prior_weight=st.sampled_from([0.0, 0.3, 2.0]))
def test_no_other_delta_on_the_support_is_better(side: Side, seed: int, prior_weight: float) -> None:
    adapters, seen = problem(seed, side)
    fused = fuse(adapters, [1, 1], seen, prior_weight=prior_weight, ridge=TINY, match_response=False)
    best = value(dense(fused), adapters, seen, prior_weight)
    assert best <= value(dense(merge(adapters, [1, 1], "sum")), adapters, seen, prior_weight) + 1e-6
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        other, index = dense(fused), fused.factors[KEY].index
        place = (slice(None), index) if side == "fa" else index
        other[place] += 0.01 * torch.randn(other[place].shape, generator=generator, dtype=torch.float64)
        assert best <= value(other, adapters, seen, prior_weight) + 1e-6
    moments, deltas = [seen.full(a.spec.name) for a in adapters], [dense(a) for a in adapters]
    whole = full_support(deltas, moments, seen.full("prior"), prior_weight=prior_weight, ridge=TINY)
    assert value(whole, adapters, seen, prior_weight) <= best + 1e-6
    said = objective(whole, deltas, moments, seen.full("prior"), prior_weight)
    assert said.item() == pytest.approx(value(whole, adapters, seen, prior_weight), abs=1e-9)


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_matches_least_squares(side: Side) -> None:
    """The stacked problem over the inputs themselves, solved by lstsq."""
    adapters, seen = problem(3, side)
    fused = fuse(adapters, [1, 1], seen, prior_weight=0.5, ridge=TINY, match_response=False)
    index = fused.factors[KEY].index
    rows = [seen.inputs[a.spec.name] for a in adapters] + [seen.inputs["prior"] * 0.5**0.5]
    answers = [seen.inputs[a.spec.name] @ dense(a).T for a in adapters] + [torch.zeros(30, OUT, dtype=torch.float64)]
    x, y = torch.cat(rows), torch.cat(answers)
    found = (
        torch.linalg.lstsq(x[:, index], y).solution.T if side == "fa" else torch.linalg.lstsq(x, y).solution.T[index]
    )
    torch.testing.assert_close(fused.factors[KEY].weight.double(), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_single_concept_is_unchanged(side: Side) -> None:
    adapters, seen = problem(1, side, count=1)
    fused = fuse(adapters, [1], seen, prior_weight=0)
    torch.testing.assert_close(dense(fused), dense(adapters[0]), rtol=1e-4, atol=1e-5)
    assert seen.asked == ["c0"]


def test_much_ridge_is_the_sum_much_prior_is_nothing() -> None:
    adapters, seen = problem(2, "fa")
    total = dense(merge(adapters, [1, 0.5], "sum"))
    ridged = fuse(adapters, [1, 0.5], seen, ridge=1e9, match_response=False)
    torch.testing.assert_close(dense(ridged), total, rtol=1e-4, atol=1e-4)
    held = fuse(adapters, [1, 0.5], seen, prior_weight=1e9, ridge=TINY, match_response=False)
    assert dense(held).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["fa", "fb"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), prior_weight=st.sampled_from([0.0, 0.3, 5.0]), weight=st.sampled_from([1.0, 0.5]))
def test_response_norm_is_matched_in_the_optimum_direction(
    side: Side, seed: int, prior_weight: float, weight: float
) -> None:
    """Energies from the inputs themselves: one factor a layer, from 1 on."""
    adapters, seen = problem(seed, side, count=3 if side == "fa" else 2)
    weights = [weight] * len(adapters)
    matched, optimum = (
        fuse(adapters, weights, seen, prior_weight=prior_weight, ridge=TINY, match_response=match_response)
        for match_response in (True, False)
    )
    inputs = {adapter.spec.name: seen.inputs[adapter.spec.name] for adapter in adapters}
    own = torch.stack([(inputs[a.spec.name] @ dense(a).T * weight).pow(2).sum(1).mean() for a in adapters]).sum()
    found, before = (
        torch.stack([(x @ dense(one).T).pow(2).sum(1).mean() for x in inputs.values()]).sum()
        for one in (matched, optimum)
    )
    torch.testing.assert_close(found, own, rtol=1e-4, atol=0)
    factor = (own / before).sqrt()
    assert factor > 0.9999
    torch.testing.assert_close(dense(matched), dense(optimum) * factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_singular_moments(side: Side) -> None:
    """Fewer inputs than columns, and no inputs but zeros."""
    adapters, seen = problem(4, side, inputs=1)
    assert dense(fuse(adapters, [1, 1], seen)).isfinite().all()
    for inputs in seen.inputs.values():
        inputs.zero_()
    torch.testing.assert_close(
        dense(fuse(adapters, [1, 1], seen)), dense(merge(adapters, [1, 1], "sum")), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_the_order_does_not_matter_to_the_bit(side: Side) -> None:
    adapters, seen = problem(5, side)
    one, other = fuse(adapters, [1, 0.7], seen), fuse(adapters[::-1], [0.7, 1], seen)
    assert torch.equal(one.factors[KEY].weight, other.factors[KEY].weight)
    assert one.to_bytes() == other.to_bytes()


def test_an_ordinary_adapter_comes_out() -> None:
    adapters, seen = problem(6, "fa")
    fused = fuse(adapters, [1, 1], seen)
    assert fused.spec.recipe["how"] == "fuse"
    assert fused.spec.parents == ("c0", "c1")
    assert set(fused.spec.tokens) == {"<c0>", "<c1>"}
    union = torch.cat([adapter.factors[KEY].index for adapter in adapters]).sort().values
    assert torch.equal(fused.factors[KEY].index, union)
    assert seen.asked == ["c0", "c1", "prior"]


def test_a_concept_that_leaves_a_layer_alone_wants_nothing_there() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [an_adapter(0, "fa", generator), an_adapter(1, "fa", generator, "unet.b")]
    seen = Seen(["c0", "c1"], generator)
    fused = fuse(adapters, [1, 1], seen, prior_weight=0, ridge=TINY, match_response=False)
    assert fused.factors.keys() == {"unet.a", "unet.b"}
    mine, index = adapters[0].factors[KEY].weight.double(), adapters[0].factors[KEY].index
    own, other = seen.full("c0")[index][:, index], seen.full("c1")[index][:, index]
    expected = mine @ own @ torch.linalg.inv(own + other)
    torch.testing.assert_close(fused.factors[KEY].weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_lbfgs_comes_to_the_optimum_and_not_below() -> None:
    adapters, seen = problem(7, "fa")
    moments, deltas = [seen.full(a.spec.name) for a in adapters], [dense(a) for a in adapters]
    prior = seen.full("prior")
    best = objective(full_support(deltas, moments, prior, prior_weight=1, ridge=TINY), deltas, moments, prior, 1)
    found = objective(gradient_fusion(deltas, moments, prior, prior_weight=1, steps=300), deltas, moments, prior, 1)
    assert best.item() <= found.item() <= best.item() * 1.001
