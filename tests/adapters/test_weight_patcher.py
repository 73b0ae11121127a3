"""Writing into base weights: exact sums, and bit-exact restoring after any sequence of writes and restores."""

from contextlib import suppress
from itertools import count
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from sbora_diffusion.adapters import weight_patcher as module
from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.file import Factor
from sbora_diffusion.adapters.layer import attach, collect
from sbora_diffusion.adapters.weight_patcher import WeightPatcher
from sbora_diffusion.utils.errors import SboraError

from .random_adapters import adapter, dense, free_intervals
from .tiny import Tiny, inject, perturb, run

SHAPES = {"model.first": (10, 12), "model.second": (11, 10)}
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10, dtype=dtype), nn.Linear(10, 11, dtype=dtype)
        with torch.no_grad():
            self.first.weight[0, 0], self.first.weight[1, 1] = -0.0, 1e-8

    def weights(self) -> dict[str, Tensor]:
        return {"first": self.first.weight.detach().clone(), "second": self.second.weight.detach().clone()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    integers = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
    return all(torch.equal(a[key].view(integers[a[key].dtype]), b[key].view(integers[b[key].dtype])) for key in a)


entries = st.tuples(
    st.sampled_from(["fa", "fb"]), free_intervals, st.integers(0, 3), st.sampled_from([1.0, -0.7, 0.3, 40.0])
)
steps = st.lists(st.tuples(st.sampled_from("abcd"), st.none() | entries), max_size=12)


@settings(max_examples=60, deadline=None)
@given(dtypes, steps)
def test_any_sequence_restores_bit_for_bit_and_depends_on_the_set_only(
    dtype: torch.dtype, steps: list[tuple[str, tuple[Side, Interval, int, float] | None]]
) -> None:
    torch.manual_seed(0)
    model = Two(dtype)
    original = model.weights()
    written = WeightPatcher(model)
    present: dict[str, tuple[Side, Interval, int, float]] = {}
    for name, entry in steps:
        if entry is not None:
            write(written, name, entry)
            present[name] = entry
        elif name in present:
            written.restore(name)
            del present[name]
    assert written.names == tuple(sorted(present))
    after = model.weights()

    torch.manual_seed(0)
    fresh = Two(dtype)
    afresh = WeightPatcher(fresh)
    for name in sorted(present, reverse=True):
        write(afresh, name, present[name])
    assert same_bits(after, fresh.weights())
    for key, weight in original.items():
        expected = weight.double()
        for side, interval, seed, strength in present.values():
            factor = factors(side, interval, seed)[key]
            expected = expected + strength * dense(factor, side, SHAPES[f"model.{key}"])
        assert_close(after[key], expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
        untouched = expected == weight.double()
        assert torch.equal(after[key][untouched], weight[untouched])

    for name in present:
        written.restore(name)
    assert same_bits(model.weights(), original)
    afresh.restore_all()
    assert same_bits(fresh.weights(), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_thousand_random_steps(dtype: torch.dtype) -> None:
    """Six adapters of both sides, some on the same columns, come, go and change their strength."""
    random = Random(0)
    adapters: dict[str, tuple[Side, Interval, int]] = {
        "a": ("fa", Interval(0, 3), 0), "b": ("fa", Interval(3, 3), 1), "c": ("fa", Interval(4, 4), 2),
        "d": ("fb", Interval(0, 4), 3), "e": ("fb", Interval(4, 2), 4), "f": ("fb", Interval(0, 4), 5),
    }  # fmt: skip
    model = Two(dtype)
    original, present = model.weights(), {}
    written = WeightPatcher(model)
    for number in range(1000):
        name = random.choice("abcdef")
        if name in present and random.random() < 0.7:
            written.restore(name)
            del present[name]
        else:
            present[name] = (*adapters[name], random.choice((1.0, -0.7, 0.3, 40.0)))
            write(written, name, present[name])
        if not present or number % 100 == 0:
            fresh = Two(dtype)
            fresh.load_state_dict({f"{key}.weight": weight for key, weight in original.items()}, strict=False)
            afresh = WeightPatcher(fresh)
            for other in sorted(present, reverse=True):
                write(afresh, other, present[other])
            assert same_bits(model.weights(), fresh.weights())
    for name in tuple(written.names):
        written.restore(name)
        assert name not in written.names
    assert same_bits(model.weights(), original)


def test_only_the_touched_columns_and_rows_are_kept() -> None:
    model = Two()
    written = WeightPatcher(model)
    write(written, "a", ("fa", Interval(0, 3), 0, 1.0))
    assert stashed(written) == 3 * (10 + 11)
    write(written, "b", ("fa", Interval(2, 3), 1, 1.0))
    assert stashed(written) == 5 * (10 + 11), "one column is shared"
    write(written, "c", ("fb", Interval(0, 2), 2, 1.0))
    assert stashed(written) == 5 * (10 + 11) + 2 * (12 + 10)
    written.restore_all()
    assert stashed(written) == 0


def stashed(written: WeightPatcher) -> int:
    """Entries in memory of their own."""
    values = [block.values for blocks in written._originals.values() for block in blocks]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in values)
    return sum(tensor.numel() for tensor in values)


def factors(side: Side, interval: Interval, seed: int) -> dict[str, Factor]:
    return adapter(interval, side, seed, SHAPES).component("model")


def write(written: WeightPatcher, name: str, entry: tuple[Side, Interval, int, float]) -> None:
    side, interval, seed, strength = entry
    written.write(name, factors(side, interval, seed), side, strength)


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("how", ["restore_all", "write again"])
def test_an_interrupt_at_any_moment_loses_nothing(monkeypatch: pytest.MonkeyPatch, how: str, is_after: bool) -> None:
    model = Two()
    original, overwrite = model.weights(), module.overwrite
    crossing = {"a": factors("fa", Interval(0, 4), 0), "b": factors("fb", Interval(2, 4), 1)}

    def interrupted_at(last: int) -> WeightPatcher:
        calls, written = count(1), WeightPatcher(model)

        def sometimes(*arguments: Any) -> None:
            if (at := next(calls)) == last and not is_after:
                raise KeyboardInterrupt
            overwrite(*arguments)
            if at == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(module, "overwrite", sometimes)
        with suppress(KeyboardInterrupt):
            written.write("a", crossing["a"], "fa")
            written.write("b", crossing["b"], "fb")
            written.write("a", crossing["a"], "fa", 0.5)
            written.restore("b")
        monkeypatch.setattr(module, "overwrite", overwrite)
        return written

    for last in range(1, 30):
        written = interrupted_at(last)
        if how == "restore_all":
            written.restore_all()
        else:
            for name in written.names:
                written.restore(name)
            written.write("c", {"first": crossing["a"]["first"]}, "fa")
            written.restore("c")
        assert same_bits(model.weights(), original), last


def test_written_equals_live(tiny: Tiny) -> None:
    model = inject("unet", tiny.load("unet"), "dog")
    layers = attach(model, "dog", "fa", Interval(0, 4), 0)
    perturb(layer.trained for layer in layers.values())
    expected = run("unet", model)
    plain = tiny.load("unet")
    before = run("unet", plain)
    written = WeightPatcher(plain)
    written.write("dog", {key.removeprefix("unet."): f for key, f in collect(model, "dog", "unet").items()}, "fa")
    assert_close(run("unet", plain), expected, rtol=1e-5, atol=1e-5)
    written.restore("dog")
    assert torch.equal(run("unet", plain), before)


def test_peft_may_come_and_go(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "live")
    layers = attach(model, "live", "fb", Interval(0, 4), 0)
    perturb(layer.trained for layer in layers.values())
    stored = {key.removeprefix("text_encoder."): f for key, f in collect(model, "live", "text_encoder").items()}

    plain = tiny.load("clip")
    before = run("clip", plain)
    written = WeightPatcher(plain)
    written.write("dog", stored, "fb")
    merged = run("clip", plain)
    attach(inject("clip", plain, "later"), "later", "fa", Interval(0, 4), 0)
    assert torch.equal(run("clip", plain), merged)
    written.write("dog", stored, "fb", strength=0.5)
    written.write("cat", stored, "fb", strength=0.5)
    assert_close(run("clip", plain), merged, rtol=1e-5, atol=1e-5)
    written.restore_all()
    assert torch.equal(run("clip", plain), before)


def test_writing_while_peft_has_merged_is_refused(tiny: Tiny) -> None:
    model = inject("clip", tiny.load("clip"), "live")
    layers = attach(model, "live", "fa", Interval(0, 4), 0)
    stored = {key.removeprefix("model."): f for key, f in collect(model, "live", "model").items()}
    written = WeightPatcher(model)
    written.write("dog", stored, "fa")
    for layer in layers.values():
        layer.module.merge()
    for forbidden in (lambda: written.write("cat", stored, "fa"), lambda: written.restore("dog"), written.restore_all):
        with pytest.raises(SboraError, match="PEFT has merged"):
            forbidden()
    assert written.names == ("dog",)
    for layer in layers.values():
        layer.module.unmerge()
    written.restore_all()


def test_a_refused_write_changes_nothing() -> None:
    model = Two()
    before = model.weights()
    written = WeightPatcher(model)
    good = factors("fa", Interval(0, 3), 0)
    other = factors("fb", Interval(0, 3), 0)
    bad: list[tuple[dict[str, Factor], Any, str]] = [
        ({**good, "third": good["first"]}, 1.0, "no linear layer third"),
        ({"first": good["first"], "second": other["second"]}, 1.0, "does not fit its weight of shape 11×10"),
        ({"first": Factor(torch.tensor([0, 1, 12]), good["first"].weight)}, 1.0, "does not fit"),
        (good, float("nan"), "strength nan"),
    ]
    for stored, strength, message in bad:
        with pytest.raises(SboraError, match=message):
            written.write("dog", stored, "fa", strength)
    with pytest.raises(SboraError, match="'dog' is not written into the weights, only nothing is"):
        written.restore("dog")
    assert written.names == ()
    assert same_bits(model.weights(), before)


def test_the_callers_mapping_stays_the_callers() -> None:
    model = Two()
    before = model.weights()
    written, stored = WeightPatcher(model), factors("fa", Interval(0, 3), 0)
    written.write("dog", stored, "fa")
    stored.clear()
    written.restore("dog")
    assert same_bits(model.weights(), before)


def test_nf4_is_refused(tiny: Tiny) -> None:
    model = tiny.load("llama-nf4")
    shapes = {"model.model.layers.0.self_attn.q_proj": (64, 64)}
    with pytest.raises(SboraError, match="is quantised") as error:
        WeightPatcher(model).write("dog", adapter(shapes=shapes).component("model"), "fa")
    assert "Attach" in str(error.value.hint)


def test_originals_follow_a_change_of_dtype() -> None:
    model = Two()
    before = {key: weight.to(torch.bfloat16) for key, weight in model.weights().items()}
    written = WeightPatcher(model)
    written.write("dog", factors("fa", Interval(0, 3), 0), "fa")
    model.to(torch.bfloat16)
    written.restore_all()
    assert same_bits(model.weights(), before)
