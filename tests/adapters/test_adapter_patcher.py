"""Adapters beside quantised weights answer as if they were in them, in any order, and leave no trace."""

from itertools import permutations
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.file import Factor
from sbora_diffusion.adapters.layer import keep_linear4bit_unpacked
from sbora_diffusion.adapters.linear_function import full_weight, num_held
from sbora_diffusion.adapters.weight_patcher import AdapterPatcher
from sbora_diffusion.utils.errors import SboraError

WIDTH, OUT, RANK = 64, 32, 4


@pytest.fixture
def model() -> nn.Module:
    """A plain layer and a quantised one of the same weight."""
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUT)
    packed: Any = Linear4bit(WIDTH, OUT, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(plain.state_dict())
    model = nn.ModuleDict({"plain": plain, "packed": packed.to("cpu")}).requires_grad_(False)
    keep_linear4bit_unpacked(model)
    return model


def factors(side: Side, seed: int) -> dict[str, Factor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(WIDTH if side == "fa" else OUT, generator=generator)[:RANK]
    shape = (OUT, RANK) if side == "fa" else (RANK, WIDTH)
    return dict.fromkeys(("plain", "packed"), Factor(index, torch.randn(shape, generator=generator)))


def delta(factor: Factor, side: Side) -> Tensor:
    change = torch.zeros(OUT, WIDTH)
    return change.index_add_(1 if side == "fa" else 0, factor.index, factor.weight)


def answers(model: Any) -> dict[str, Tensor]:
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(9))
    return {name: layer(x) for name, layer in model.items()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("side", ["fa", "fb"])
def test_output_equals_written_weights(model: Any, side: Side, autocast: bool) -> None:
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(9))
    own, placed = factors(side, 1), AdapterPatcher(model)
    expected = x @ (0.5 * delta(own["packed"], side)).T
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model["packed"](x)
        placed.write("a", own, side, 0.5)
        torch.testing.assert_close(model["packed"](x) - before, expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(
        before, x @ full_weight(model["packed"].weight).T + model["packed"].bias, rtol=0.1, atol=0.1
    )


def test_any_order_and_any_way_out_is_bit_for_bit(model: Any) -> None:
    before, seen = answers(model), []
    sides: dict[str, Side] = {"a": "fa", "b": "fb", "c": "fa"}
    for order in permutations(sides):
        placed = AdapterPatcher(model)
        for name in order:
            placed.write(name, factors(sides[name], ord(name)), sides[name])
        seen.append(answers(model))
        for name in reversed(order[:2]):
            placed.restore(name)
        assert placed.names == (order[2],)
        placed.write(order[2], factors("fa", 7), "fa", 2.0)  # in place of what it was
        placed.restore(order[2])
        after = answers(model)
        assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(one[key], seen[0][key]) for one in seen for key in before)
    assert all(not torch.equal(seen[0][key], before[key]) for key in before)


def test_misfit_changes_nothing(model: Any) -> None:
    before, placed = answers(model), AdapterPatcher(model)
    wide = Factor(torch.tensor([WIDTH]), torch.ones(OUT, 1))
    with pytest.raises(SboraError, match="does not fit its weight of shape 32×64"):
        placed.write("a", {"plain": factors("fa", 1)["plain"], "packed": wide}, "fa")
    assert placed.names == ()
    assert all(torch.equal(value, before[key]) for key, value in answers(model).items())


def test_entries_are_counted_unpacked(model: Any) -> None:
    assert num_held(model["packed"].weight) == num_held(model["plain"].weight) == OUT * WIDTH
