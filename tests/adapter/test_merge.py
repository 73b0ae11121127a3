"""merge is the sum of the dense deltas, in any order; certify tells what it is worth."""

import logging
import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbora_diffusion.adapter.basis import Interval, Side
from sbora_diffusion.adapter.file import Adapter
from sbora_diffusion.adapter.merge import certify, merge
from sbora_diffusion.errors import SboraError

from .random_adapters import SHAPES, adapter, dense, free_intervals, sides

strengths = st.floats(-2, 2, allow_subnormal=False, width=32)
parts = st.lists(st.tuples(free_intervals, st.sampled_from(["dog", "cat", "fox"]), strengths), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(sides, parts, st.randoms(use_true_random=False))
def test_merge_is_the_sum_of_dense_deltas_in_any_order(
    side: Side, parts: list[tuple[Interval, str, float]], random: Random
) -> None:
    adapters = [adapter(interval, side, seed, name=name) for seed, (interval, name, _) in enumerate(parts)]
    weights = [weight for _, _, weight in parts]
    merged = merge(adapters, weights, "sum")
    for key, shape in SHAPES.items():
        total = sum(weight * dense(a.factors[key], side, shape) for a, weight in zip(adapters, weights, strict=True))
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(
            dense(merged.factors[key], side, shape), total.float().double(), rtol=1e-6, atol=1e-7
        )
        assert merged.factors[key].index.tolist() == sorted(
            {i for a in adapters for i in a.factors[key].index.tolist()}
        )
    order = list(range(len(parts)))
    random.shuffle(order)
    again = merge([adapters[i] for i in order], [weights[i] for i in order], "sum")
    assert again.to_bytes() == merged.to_bytes()


def test_disjoint_adapters_can_be_read_off_the_merge_exactly() -> None:
    dog, cat = adapter(Interval(0, 3), name="dog"), adapter(Interval(3, 2), seed=1, name="cat", tokens={"<cat>": "cat"})
    merged = merge([dog, cat], [1.0, 1.0], "sum")
    for key, factor in merged.factors.items():
        for part in (dog, cat):
            where = torch.isin(factor.index, part.factors[key].index)
            order = part.factors[key].index.argsort()
            assert torch.equal(factor.weight[:, where], part.factors[key].weight[:, order])
    assert merged.spec.name == "cat+dog"
    assert merged.spec.parents == ("cat", "dog")
    assert merged.spec.intervals == (Interval(0, 3), Interval(3, 2))
    assert merged.spec.rank == 5
    assert merged.spec.tokens == {"<cat>": "cat", "<dog>": "dog"}
    assert merged.spec.recipe == {"how": "sum", "weights": [["cat", 1.0], ["dog", 1.0]]}


def test_a_merge_can_be_merged_again() -> None:
    parts = [adapter(Interval(3 * i, 3), seed=i, name=n, tokens={f"<{n}>": n}) for i, n in enumerate(("a", "b", "c"))]
    nested = merge([merge(parts[:2], [1.0, 0.5], "sum"), parts[2]], [1.0, 2.0], "sum")
    flat = merge(parts, [1.0, 0.5, 2.0], "sum")
    assert nested.spec.parents == flat.spec.parents == ("a", "b", "c")
    assert all(torch.equal(nested.factors[key].weight, flat.factors[key].weight) for key in flat.factors)


def test_layers_of_only_one_adapter_stay() -> None:
    dog = adapter(shapes={"unet.mid.to_q": (10, 12)}, name="dog")
    cat = adapter(Interval(3, 3), shapes={"text_encoder.fc": (8, 8)}, name="cat", tokens={})
    merged = merge([dog, cat], [1.0, 1.0], "sum")
    assert set(merged.factors) == {"unet.mid.to_q", "text_encoder.fc"}
    assert merged.spec.rank == 3


def test_colliding_tokens_are_renamed(caplog: pytest.LogCaptureFixture) -> None:
    tokens = [{"<pet>": "cat"}, {"<pet>": "dog"}, {"<pet-2>": "fox"}, {"<pet>": "hen", "bare": "x"}, {"bare": "y"}]
    adapters = [adapter(Interval(i, 1), seed=i, name=f"{i}", tokens=t) for i, t in enumerate(tokens)]
    with caplog.at_level(logging.WARNING):
        merged = merge(adapters, [1.0] * 5, "sum")
    nouns = {"<pet>": "cat", "<pet-3>": "dog", "<pet-2>": "fox", "<pet-4>": "hen", "bare": "x", "bare-2": "y"}
    assert merged.spec.tokens == nouns
    assert torch.equal(merged.tokens["text_encoder.<pet-4>"], adapters[3].tokens["text_encoder.<pet>"])
    assert torch.equal(merged.tokens["text_encoder.<pet-2>"], adapters[2].tokens["text_encoder.<pet-2>"])
    assert len(merged.tokens) == 6
    assert "<pet> of 1 is called <pet-3> in the merge" in caplog.text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"side": "fb"}, "differ in side: fa and fb"),
        ({"base_fingerprint": "beef"}, "differ in base fingerprint: beef and f00d"),
    ],
)
def test_what_does_not_belong_together(other: dict[str, str], message: str) -> None:
    for function in (lambda pair: merge(pair, [1.0, 1.0], "sum"), certify):
        with pytest.raises(SboraError, match=message):
            function([adapter(), adapter(**other)])  # type: ignore[arg-type]


def test_layers_of_different_shapes() -> None:
    with pytest.raises(SboraError, match="have different shapes"):
        merge([adapter(shapes={"unet.x": (8, 8)}), adapter(shapes={"unet.x": (9, 8)})], [1.0, 1.0], "sum")


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0], [1.0, math.nan]])
def test_one_finite_weight_for_each(weights: list[float]) -> None:
    with pytest.raises(SboraError, match="expected one number for each"):
        merge([adapter(), adapter()], weights, "sum")


def test_nothing_to_merge() -> None:
    for function in (lambda: merge([], [], "sum"), lambda: certify([])):
        with pytest.raises(SboraError, match="got no adapters"):
            function()


def widths(adapters: list[Adapter]) -> dict[str, int]:
    return {key: SHAPES[key][1 if adapters[0].spec.side == "fa" else 0] for key in SHAPES}


@given(sides, st.lists(free_intervals, min_size=1, max_size=4))
def test_certificate_counts_by_interval_arithmetic(side: Side, intervals: list[Interval]) -> None:
    adapters = [adapter(interval, side, seed) for seed, interval in enumerate(intervals)]
    certificate = certify(adapters, widths(adapters))
    positions = [p for interval in intervals for p in range(interval.start, interval.stop)]
    overlap = sum(positions.count(p) > 1 for p in set(positions))
    assert certificate.disjoint == (overlap == 0)
    for key, layer in certificate.layers.items():
        assert layer.overlap == overlap
        assert layer.free == SHAPES[key][1 if side == "fa" else 0] - len(set(positions))
        for position, norm in enumerate(layer.norms):
            assert norm == pytest.approx(float(dense(adapters[position].factors[key], side, SHAPES[key]).norm()), 1e-5)


def test_certificate_says_what_is_not_guaranteed() -> None:
    disjoint = [adapter(Interval(0, 3), name="dog"), adapter(Interval(3, 3), name="cat")]
    text = certify(disjoint, widths(disjoint)).describe()
    assert text.startswith("disjoint: no column of 3 layers")
    assert "free: at least 6 columns" in text
    assert "‖ΔW‖ of dog" in text
    assert "not guaranteed: that concepts do not disturb each other" in text
    shared = certify([adapter(Interval(0, 3)), adapter(Interval(2, 3))]).describe()
    assert shared.startswith("not disjoint: 3 columns in 3 of 3 layers have several")
    assert "free" not in shared
