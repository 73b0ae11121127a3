"""Intervals and permutations: disjoint, in range, and the same for ever."""

from hashlib import blake2b

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sbora_diffusion.adapters.basis import Interval, canonical, first_free, indices, permutation
from sbora_diffusion.utils.errors import SboraError

intervals = st.builds(Interval, st.integers(0, 10**6), st.integers(1, 10**4))


@given(intervals)
def test_interval_survives_text(interval: Interval) -> None:
    assert Interval.parse(str(interval)) == interval


@pytest.mark.parametrize(
    "text", ["", "8", "8:", "-1:4", "4:4", "8:4", "1:2:3", " 1:2", "٣:٤", "1" * 5000 + ":2", "1:2\n"]
)
def test_interval_refuses_other_text(text: str) -> None:
    with pytest.raises(SboraError):
        Interval.parse(text)


@given(intervals, intervals)
def test_overlap_is_a_shared_position(a: Interval, b: Interval) -> None:
    shared = max(a.start, b.start) < min(a.stop, b.stop)
    assert a.overlaps(b) == b.overlaps(a) == shared


@pytest.mark.parametrize(
    "layer",
    [
        "encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.0.self_attn.q_proj",
        "base_model.model.text_model.encoder.layers.0.self_attn.q_proj",
        "base_model.model.encoder.layers.0.self_attn.q_proj.base_layer",
        "_orig_mod.encoder.layers.0.self_attn.q_proj.base_layer",
        "_orig_mod.base_model.model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_a_layer_has_one_name(layer: str) -> None:
    assert canonical(layer) == "encoder.layers.0.self_attn.q_proj"
    assert torch.equal(permutation(layer, 40, 3), permutation("encoder.layers.0.self_attn.q_proj", 40, 3))


def test_other_names_stay() -> None:
    assert canonical("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert canonical("vision.text_model.layer") == "vision.text_model.layer"


def philox_word(counter: int, key: int) -> list[int]:
    """Philox4x64-10 by the book (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    mask = 2**64 - 1
    c = [(counter >> shift) & mask for shift in (0, 64, 128, 192)]
    k0, k1 = key & mask, key >> 64
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k0, p1 & mask, (p0 >> 64) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


@given(st.text("abc.", min_size=1, max_size=8), st.integers(1, 70), st.integers(0, 2**40))
def test_permutation_is_argsorted_philox(layer: str, dim: int, seed: int) -> None:
    key = int.from_bytes(blake2b(f"{seed}/{canonical(layer)}".encode(), digest_size=16).digest(), "little")
    words = [word for block in range(1, dim // 4 + 2) for word in philox_word(block, key)][:dim]
    assert permutation(layer, dim, seed).tolist() == sorted(range(dim), key=words.__getitem__)


def test_permutation_is_ours_to_change() -> None:
    permutation("layer", 8, 0).zero_()
    assert sorted(permutation("layer", 8, 0).tolist()) == list(range(8))


@given(st.integers(1, 400), st.integers(1, 40), st.integers(0, 9))
def test_slots_share_no_column(dim: int, rank: int, seed: int) -> None:
    slots = [Interval(slot * rank, rank) for slot in range(dim // rank)]
    owned = [column for slot in slots for column in indices("layer", dim, slot, seed).tolist()]
    assert len(set(owned)) == len(owned) == dim // rank * rank
    assert all(0 <= column < dim for column in owned)


def test_indices_do_not_keep_the_permutation() -> None:
    assert indices("layer", 320, Interval(8, 4), 0).untyped_storage().nbytes() == 4 * 8


def test_layers_and_seeds_differ() -> None:
    a = permutation("a", 320, 0)
    assert not torch.equal(a, permutation("b", 320, 0))
    assert not torch.equal(a, permutation("a", 320, 1))


def test_interval_must_fit_the_layer() -> None:
    with pytest.raises(
        SboraError, match=r"interval 316:324 does not fit layer mid\.to_q, which has the positions 0:320"
    ):
        indices("base_model.model.mid.to_q", 320, Interval(316, 8), 0)


@given(st.lists(st.builds(Interval, st.integers(0, 60), st.integers(1, 12)), max_size=8), st.integers(1, 12))
def test_first_free_is_the_first_gap(taken: list[Interval], rank: int) -> None:
    width = 64
    fits = [
        start
        for start in range(width - rank + 1)
        if not any(Interval(start, rank).overlaps(interval) for interval in taken)
    ]
    if fits:
        assert first_free(taken, rank, width) == Interval(fits[0], rank)
    else:
        with pytest.raises(SboraError, match="positions are free"):
            first_free(taken, rank, width)
