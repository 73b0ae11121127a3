"""merge is the sum of the dense deltas, in any order."""

import logging
import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.merge import distinct_tokens, merge
from sbora_diffusion.utils.errors import SboraError

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


def test_concept_in_two_merges_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    dog, cat, fox = (
        adapter(Interval(3 * i, 3), seed=i, name=n, tokens={}) for i, n in enumerate(("dog", "cat", "fox"))
    )
    merge([merge([dog, cat], [1, 1], "sum"), fox], [1, 1], "sum")
    assert caplog.messages == []
    twice = merge([merge([dog, cat], [1, 1], "sum"), merge([dog, fox], [1, 1], "sum")], [1, 1], "sum")
    assert caplog.messages == ["dog is in 2 of the merged adapters: it counts several times in columns that they share"]
    for key, shape in SHAPES.items():
        expected = 2 * dense(dog.factors[key], "fa", shape) + sum(
            dense(a.factors[key], "fa", shape) for a in (cat, fox)
        )
        assert torch.equal(dense(twice.factors[key], "fa", shape), expected)


def test_names_and_tokens_are_made_distinct() -> None:
    names = ["dog", "dog", "dog-2", "dog"]
    adapters = [adapter(seed=i, name=name, tokens={"<dog>": f"noun {i}"}) for i, name in enumerate(names)]
    found = distinct_tokens(adapters)
    assert [a.spec.name for a in found] == ["dog", "dog-3", "dog-2", "dog-4"]
    assert [a.spec.tokens for a in found] == [
        {"<dog>": "noun 0"}, {"<dog-2>": "noun 1"}, {"<dog-3>": "noun 2"}, {"<dog-4>": "noun 3"}
    ]  # fmt: skip
    for one, other in zip(adapters, found, strict=True):
        (token,) = other.spec.tokens
        assert torch.equal(one.tokens["text_encoder.<dog>"], other.tokens[f"text_encoder.{token}"])
        assert other.factors == one.factors


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
    assert "<pet> of 1 is renamed to <pet-3> in the merge" in caplog.text


def test_tokens_that_differ_in_capitals_are_renamed() -> None:
    twins = [adapter(Interval(i, 1), name=f"{i}", tokens={t: "cat"}) for i, t in enumerate(("<pet>", "<Pet>"))]
    assert list(merge(twins, [1.0] * 2, "sum").spec.tokens) == ["<pet>", "<Pet-2>"]


@pytest.mark.parametrize(
    ("other", "message", "hint"),
    [
        (
            {"side": "fb"},
            "differ in side: fa and fb",
            "or write them all into one pipeline: sbora-diffusion bake NAME NAME --out FOLDER",
        ),
        ({"seed": 1}, "differ in seed: 0 and 1", "sbora-diffusion bake NAME NAME --out FOLDER"),
        (
            {"base_fingerprint": "beef"},
            "differ in base fingerprint: beef and f00d",
            "Train them for the same base model.",
        ),
    ],
)
def test_incompatible_adapters_are_refused(other: dict[str, Any], message: str, hint: str) -> None:
    dog = adapter()
    with pytest.raises(SboraError, match=message) as caught:
        merge([dog, replace(dog, spec=replace(dog.spec, **other))], [1.0, 1.0], "sum")
    assert (caught.value.hint or "").endswith(hint)


def test_layers_of_different_shapes() -> None:
    with pytest.raises(SboraError, match="have different shapes"):
        merge([adapter(shapes={"unet.x": (8, 8)}), adapter(shapes={"unet.x": (9, 8)})], [1.0, 1.0], "sum")


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0], [1.0, math.nan]])
def test_one_finite_weight_for_each(weights: list[float]) -> None:
    with pytest.raises(SboraError, match="expected one finite weight for each"):
        merge([adapter(), adapter()], weights, "sum")


def test_nothing_to_merge() -> None:
    with pytest.raises(SboraError, match="got no adapters"):
        merge([], [], "sum")
