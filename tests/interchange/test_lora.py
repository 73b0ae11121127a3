"""As a LoRA and back: the same ΔW, the same bits, and nothing that is dense."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.file import Adapter, Dense, Factor
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.interchange.lora import Lora, check_lora, from_loras, owned_intervals, to_loras
from sbora_diffusion.utils.errors import SboraError

from ..adapters.random_adapters import dense, free_intervals, sides
from .samples import SHAPES, random_adapter

TO_K, TO_OUT, _ = SHAPES


@settings(max_examples=50, deadline=None)
@given(sides, free_intervals, st.integers(0, 9))
def test_the_same_delta_and_back_bit_for_bit(side: Side, interval: Interval, seed: int) -> None:
    interval = Interval(interval.start % 4, interval.rank)
    adapter = random_adapter(SHAPES, side, interval, seed)
    loras = to_loras(adapter, SHAPES)
    for key, lora in loras.items():
        expected = dense(adapter.factors[key], side, SHAPES[key])
        assert torch.equal(lora.up.double() @ lora.down.double() * lora.scale, expected)
        frozen = lora.down if side == "fa" else lora.up.t()
        assert torch.equal(frozen.sum(1), torch.ones(interval.rank))
        assert set(frozen.unique().tolist()) == {0.0, 1.0}
    found, factors = from_loras(loras)
    assert found == side
    for key, factor in adapter.factors.items():
        assert torch.equal(factors[key].index, factor.index)
        assert torch.equal(factors[key].weight, factor.weight)
    widths = {key: shape[1 if side == "fa" else 0] for key, shape in SHAPES.items()}
    assert owned_intervals(factors, widths, 0) == (interval,)


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_scales_are_folded_and_repeated_columns_added(side: Side) -> None:
    one_hot = torch.zeros(3, 8)
    one_hot[0, 5], one_hot[1, 2], one_hot[2, 5] = 2.0, -1.0, 0.5
    trained = torch.randn(6, 3)
    lora = Lora(one_hot, trained, 0.25) if side == "fa" else Lora(trained.t(), one_hot.t(), 0.25)
    found, factors = from_loras({"unet.layer": lora})
    shape = (6, 8) if side == "fa" else (8, 6)
    assert found == side
    assert factors["unet.layer"].index.tolist() == [2, 5]
    assert_close(dense(factors["unet.layer"], side, shape), (lora.up @ lora.down * 0.25).double(), rtol=1e-6, atol=1e-7)


def test_where_both_factors_are_one_hot_the_file_may_choose() -> None:
    both = {"unet.layer": Lora(torch.eye(2, 5), torch.eye(4, 2))}
    assert from_loras(both)[0] == "fa"
    assert from_loras(both, "fb")[0] == "fb"


def test_dense_and_mixed_loras_are_refused() -> None:
    fa = to_loras(random_adapter(), SHAPES)
    fb = to_loras(random_adapter(side="fb"), SHAPES)
    key = next(iter(SHAPES))
    with pytest.raises(SboraError, match=r"is a dense LoRA, not an SBoRA adapter: neither factor .* \(1 of 3 layers\)"):
        from_loras(fa | {key: Lora(torch.randn(3, 12), torch.randn(10, 3))})
    with pytest.raises(SboraError, match="one-hot columns in some layers and one-hot rows in others"):
        from_loras(fa | {key: fb[key]})
    with pytest.raises(SboraError, match="no LoRA layer"):
        from_loras({})


def test_intervals_are_read_off_the_numbers() -> None:
    adapter = random_adapter(interval=Interval(2, 4))
    widths = {key: shape[1] for key, shape in SHAPES.items()}
    claimed = (Interval(2, 2), Interval(4, 2))

    def owned(factors: dict[str, Factor], *claimed: Interval, seed: int = 0) -> tuple[Interval, ...]:
        return owned_intervals(factors, widths, seed, claimed)

    assert owned(adapter.factors) == (Interval(2, 4),)
    assert owned(adapter.factors, *claimed) == claimed
    assert owned(adapter.factors, Interval(0, 4)) == (Interval(2, 4),)  # a lie
    assert owned(adapter.factors, seed=1) == ()
    key = next(iter(SHAPES))
    some = adapter.factors | {key: Factor(adapter.factors[key].index[:2], adapter.factors[key].weight[:, :2])}
    assert owned(some) == ()
    with pytest.raises(SboraError, match=r"writes .*, but has the positions 0:2"):
        owned_intervals(adapter.factors, dict.fromkeys(SHAPES, 2), 0)
    assert owned(some, *claimed) == claimed  # a merge of concepts that have different layers


@pytest.mark.parametrize(
    ("down", "up", "scale", "message"),
    [
        (torch.ones(2, 3, 1, 1), torch.ones(4, 2), 1.0, "the down factor of layer x has the shape 2×3×1×1"),
        (torch.ones(2, 3), torch.ones(0, 2), 1.0, "the up factor of layer x has the shape 0×2"),
        (torch.ones(2, 3), torch.ones(4, 3), 1.0, r"the ranks 2 \(down\) and 3 \(up\)"),
        (torch.full((2, 3), torch.inf), torch.ones(4, 2), 1.0, "not finite"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 2), 1.0, "dtype torch.int64"),
        (torch.ones(2, 3), torch.ones(4, 2), float("nan"), "the scale nan"),
    ],
)
def test_files_that_are_no_lora(down: Tensor, up: Tensor, scale: float, message: str) -> None:
    with pytest.raises(SboraError, match=message):
        check_lora("x", Lora(down, up, scale))


def test_an_adapter_for_another_model() -> None:
    with pytest.raises(SboraError, match="which the model does not have"):
        to_loras(random_adapter(), {})


def test_a_low_rank_adapter_of_another_method_is_what_it_is() -> None:
    one, other = Dense(torch.randn(10, 2), torch.randn(2, 12)), Dense(torch.randn(10, 3), torch.randn(3, 16))
    lora = Adapter(replace(random_adapter().spec, format=2, method="lora"), {}, {}, {TO_K: one, TO_OUT: other})
    found = to_loras(lora, SHAPES)
    assert {key: each.rank for key, each in found.items()} == {TO_K: 3, TO_OUT: 3}
    assert one.down is not None
    torch.testing.assert_close(found[TO_K].up @ found[TO_K].down, one.up @ one.down)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {TO_K: Dense(torch.ones(10, 12))},
            "is of the method dora, whose change of unet.*attn2.to_k is no",
        ),
        ({TO_K: Dense(torch.ones(10, 2), torch.ones(2, 12), torch.ones(10, 1))}, "is no LoRA"),
        ({}, "has no layer"),
    ],
)
def test_changes_that_are_no_lora(layers: dict[str, Dense], message: str) -> None:
    with pytest.raises(SboraError, match=message):
        to_loras(Adapter(replace(random_adapter().spec, format=2, method="dora"), {}, {}, layers), SHAPES)


def test_embeddings_for_each_layer_are_not_exported(tmp_path: Path) -> None:
    ours = random_adapter()
    layerwise = replace(ours, spec=replace(ours.spec, format=2, method="sbora-fa", embedding_layers=1))
    with pytest.raises(SboraError, match="has embeddings for each layer"):
        export(layerwise, SHAPES, "diffusers", tmp_path, resolution=16, date="2026-01-02")
    assert not list(tmp_path.iterdir())
