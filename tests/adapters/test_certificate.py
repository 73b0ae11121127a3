"""certify counts by the indices in the files, and what it guarantees holds when it is tried."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.certificate import certify, layer_group
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.weight_patcher import WeightPatcher
from sbora_diffusion.utils.errors import SboraError

from .random_adapters import SHAPES, adapter, dense, free_intervals, sides

intervals_of_several = st.lists(free_intervals, min_size=2, max_size=3)


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


def test_certificate_lists_what_is_not_guaranteed() -> None:
    disjoint = [adapter(Interval(0, 3), name="dog"), adapter(Interval(3, 3), name="cat")]
    text = certify(disjoint, widths(disjoint)).describe()
    assert text.startswith("disjoint: no column of 3 layers is written by two adapters")
    assert text.count("\nguaranteed: ") == 3
    assert "free: at least 6 columns" in text
    assert "‖ΔW‖ of dog" in text
    assert "not guaranteed: that concepts do not disturb each other" in text
    shared = certify([adapter(Interval(0, 3)), adapter(Interval(2, 3), name="cat")]).describe()
    assert shared.startswith("not disjoint: 3 columns in 3 of 3 layers are written by several")
    assert "\n  dog and cat share 3\n" in shared
    assert "at most one concept" not in shared
    assert "free" not in shared


@settings(max_examples=40, deadline=None)
@given(sides, intervals_of_several, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_guarantees_hold(side: Side, intervals: list[Interval], dtype: torch.dtype) -> None:
    adapters = [adapter(interval, side, seed, name=f"{seed}") for seed, interval in enumerate(intervals)]
    text = certify(adapters).describe()
    key, shape = next(iter(SHAPES.items()))
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    writers = sum((dense(a.factors[key], side, shape) != 0).int() for a in adapters)
    assert isinstance(writers, Tensor)
    assert ("each weight is written by at most one concept" in text) == (int(writers.max()) <= 1)
    if "same in any order" in text:
        sums = [added(base, order, key, side) for order in permutations(adapters)]
        assert all(torch.equal(sums[0], other) for other in sums)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    layer.weight.data.copy_(base)
    written = WeightPatcher(nn.ModuleDict({"layer": layer}))
    for a in adapters:
        written.write(a.spec.name, {"layer": a.factors[key]}, side)
    for a in adapters[1:]:
        written.restore(a.spec.name)
    if "removed again, bit for bit" in text or "are removed bit for bit" in text:
        assert torch.equal(layer.weight, added(base, adapters[:1], key, side))


def added(base: Tensor, adapters: tuple[Adapter, ...] | list[Adapter], key: str, side: Side) -> Tensor:
    """As any tool would: dense deltas, one after the other, in the weight's own dtype."""
    total = base
    for a in adapters:
        total = (total.float() + dense(a.factors[key], side, SHAPES[key]).float()).to(base.dtype)
    return total


def test_adapters_that_cannot_be_summed() -> None:
    for other, message in (({"side": "fb"}, "differ in side: fa and fb"), ({"base_fingerprint": "x"}, "fingerprint")):
        with pytest.raises(SboraError, match=message):
            certify([adapter(), adapter(**other)])  # type: ignore[arg-type]
    with pytest.raises(SboraError, match="got no adapters"):
        certify([])


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "unet.down_blocks.attn1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "unet.mid_block.attn2"),
        ("text_encoder.encoder.layers.11.self_attn.out_proj", "text_encoder.encoder.self_attn"),
        ("model.layers.3.mlp.up_proj", "model.layers"),
    ],
)
def test_groups(key: str, group: str) -> None:
    assert layer_group(key) == group


def test_a_group_is_its_layers_together() -> None:
    shapes = {f"unet.mid_block.{i}.attn1.to_q": (10 + i, 12 + i) for i in range(2)} | {"unet.mid_block.attn2.x": (9, 9)}
    adapters = [adapter(Interval(0, 3), shapes=shapes), adapter(Interval(2, 3), seed=1, shapes=shapes)]
    certificate = certify(adapters, {key: shape[1] for key, shape in shapes.items()})
    assert list(certificate.groups) == ["unet.mid_block.attn1", "unet.mid_block.attn2"]
    number, together = certificate.groups["unet.mid_block.attn1"]
    assert (number, together.overlap, together.free) == (2, 2, 12 - 5)
    deltas = [adapters[0].factors[key].weight for key in sorted(shapes)[:2]]
    assert together.norms[0] == pytest.approx(float(torch.cat([delta.flatten() for delta in deltas]).norm()), 1e-5)
