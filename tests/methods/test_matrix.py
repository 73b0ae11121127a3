"""The matrix: every method in every family counts what it trains, trains, resumes, saves, merges and generates.

A new method needs a row in ROWS. What only one method does is tested in test_methods.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbora_diffusion.adapters import baseline_merges
from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.methods import calibration
from sbora_diffusion.methods.live import InjectedConcept, injected_concept
from sbora_diffusion.methods.merging import merge
from sbora_diffusion.methods.registry import configure, find_method, method_names
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.layerwise_tokens import cross_attentions
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError

from ..models.families.conftest import SAVERS, SETTINGS, last_of, make_concept, tiny_base, train_and_copy
from ..training.test_train import assert_same, snapshot

RANK = 4
VARIANTS = {"sd2": ("sbora-fa", "lora", "custom-diffusion")}  # of a family: what differs does not depend on methods


@dataclass(frozen=True)
class Row:
    """What a method must do.

    Attributes:
        size: (out, in) of a layer -> number of trained parameters, by the paper's formula, at rank 4.
        merges: its merges, the default one first, with the factor of each of two concepts; None: not a weighted sum.
        adapts: which layers.
        families: where it can be trained.
    """

    size: Callable[[int, int], int]
    merges: dict[str, float | None]
    adapts: Callable[[str], bool] = lambda _: True
    families: tuple[str, ...] = tuple(SAVERS)


def near_square(number: int) -> tuple[int, int]:
    """Return the two factors of a number that are closest to each other, the smaller one first."""
    small = max(n for n in range(1, number + 1) if number % n == 0 and n * n <= number)
    return small, number // small


def lokr_size(out: int, in_: int) -> int:
    (a, c), (b, d) = near_square(out), near_square(in_)
    return a * b + (c * d if ceil(max(c, d) / 2) <= RANK else RANK * (c + d))


def is_cross_attention(key: str) -> bool:
    return key.startswith("unet.") and key.endswith((".attn2.to_k", ".attn2.to_v"))


ROWS = {
    "sbora-fa": Row(lambda out, _: RANK * out, {"fuse": None, "sum": 1.0}),
    "sbora-fb": Row(lambda _, in_: RANK * in_, {"fuse": None, "sum": 1.0}),
    "blocklora": Row(lambda _, in_: RANK * in_, {"sum": 1.0}),
    "lora": Row(lambda out, in_: RANK * (out + in_), {"average": 0.5, "sum": 1.0}),
    "dora": Row(lambda out, in_: RANK * (out + in_) + out, {"average": 0.5, "sum": 1.0}),
    "lokr": Row(lokr_size, {"average": 0.5, "sum": 1.0}),
    "oft": Row(lambda _, in_: in_ // RANK * RANK * (RANK - 1) // 2, {"average": 0.5, "sum": 1.0}),
    "orthogonal": Row(lambda out, _: RANK * out, {"sum": 0.6, "average": 0.5}),
    "mix-of-show": Row(lambda out, in_: RANK * (out + in_), {"gradient": None, "average": 0.5, "sum": 1.0}),
    "custom-diffusion": Row(
        lambda out, in_: out * in_, {"constrained": None}, is_cross_attention, ("sd", "sd2", "sdxl")
    ),
    "textual-inversion": Row(lambda _, __: 0, {"tokens": 0.0}, lambda _: False),
}


def test_every_method_has_a_row() -> None:
    assert set(ROWS) == set(method_names())


@dataclass(frozen=True)
class Cell:
    """A method in a family, and one trained concept."""

    base: Base
    before: dict[str, Tensor]  # the base model's weights
    method: str
    config: TrainConfig
    concept: Concept
    adapter: Adapter
    interrupted: Path  # its run folder after the first of two steps

    @property
    def interval(self) -> Interval | None:
        return Interval(0, RANK) if find_method(self.method).owns_interval else None

    def is_untouched(self) -> bool:
        return all(torch.equal(value, self.before[key]) for key, value in snapshot(self.base).items())

    def perturbed(self, live: InjectedConcept, name: str, seed: int) -> Adapter:
        """Return a random concept of this name, and leave it injected."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        factors, dense, rows = live.learned()
        spec = replace(self.adapter.spec, name=name, tokens={f"<{name}>": "dog"})
        return Adapter(spec, factors, {f"{part}.<{name}>": tensor for part, tensor in rows.items()}, dense)


@pytest.fixture(scope="module", params=list(SAVERS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Concept, Path]:
    """Return a tiny base model, a concept, and a folder named after the kind of base model."""
    folder = tmp_path_factory.mktemp("matrix") / request.param
    folder.mkdir()
    return tiny_base(request.param, folder), make_concept(folder, "rex", "red"), folder


@pytest.fixture(scope="module", params=list(ROWS))
def cell(request: pytest.FixtureRequest, family: tuple[Base, Concept, Path]) -> Cell:
    (base, concept, folder), method = family, request.param
    prior = {"prior_batch": "1" if method == "blocklora" else "0"}  # whose loss needs prior samples
    config, before = configure(base.family.name, method, SETTINGS | prior), snapshot(base)
    kind = folder.name
    interval = Interval(0, RANK) if find_method(method).owns_interval else None
    if method not in VARIANTS.get(kind, ROWS):
        pytest.skip(f"{method} is tested in the family of {kind}")
    if kind not in ROWS[method].families:
        with pytest.raises(SboraError, match="which this base model does not have"):
            last_of(concept, base, interval, config, folder / method)
        pytest.skip(f"{method} refuses {kind}")
    interrupted = folder / f"{method}-interrupted"
    adapter = train_and_copy(concept, base, interval, config, folder / method, interrupted)
    return Cell(base, before, method, config, concept, adapter, interrupted)


def test_trains_exactly_these_parameters(cell: Cell) -> None:
    base, row = cell.base, ROWS[cell.method]
    layers = {key: shape for key, shape in base.layer_shapes.items() if row.adapts(key)}
    weights = sum(row.size(*shape) for shape in layers.values())
    count = len(cross_attentions(base)) if cell.config.method.layerwise_tokens else 1
    width = sum(rows.shape[1] for rows in cell.adapter.tokens.values())
    with injected_concept(cell.concept, base, cell.interval, cell.config) as live:
        trained = live.parameters()
        assert sum(p.numel() for p in trained) == weights + count * cell.config.method.token_vectors * width
        assert all(p.requires_grad for p in trained)
        ours = {id(p) for p in trained}
        others = [p for part in base.adapted for p in base.component(part).parameters() if id(p) not in ours]
        assert not any(p.requires_grad for p in others)
    method, frozen = find_method(cell.method), count * width if cell.method == "custom-diffusion" else 0
    assert method.num_weights(base, cell.config) == weights
    assert method.num_parameters(base, cell.config) == sum(p.numel() for p in trained) - frozen


def test_trains_and_leaves_the_base_model_untouched(cell: Cell) -> None:
    adapter, row = cell.adapter, ROWS[cell.method]
    assert {*adapter.factors, *adapter.dense} == {key for key in cell.base.layers if row.adapts(key)}
    denoiser = [key for key in (*adapter.factors, *adapter.dense) if key.startswith(cell.base.family.denoiser)]
    changed = [key for key in denoiser if delta(adapter, key, cell.base).any()]
    assert len(changed) >= len(denoiser) / 2  # not all: SD3's last block discards what it computes of the text
    assert adapter.spec.method_name == cell.method
    assert cell.is_untouched()


def test_file_holds_what_was_trained(cell: Cell, tmp_path: Path) -> None:
    cell.adapter.save(tmp_path / "rex.safetensors")
    loaded = Adapter.load(tmp_path / "rex.safetensors")
    assert loaded.spec == cell.adapter.spec
    assert_equal(loaded, cell.adapter)


def test_resume_is_bitwise_identical(cell: Cell) -> None:
    resumed = last_of(cell.concept, cell.base, cell.interval, cell.config, cell.interrupted, resume=True)
    assert_equal(resumed, cell.adapter)


def test_file_predicts_as_the_training_did_and_comes_out_again(cell: Cell) -> None:
    base, plain = cell.base, predict(cell.base, "a dog")
    with injected_concept(cell.concept, base, cell.interval, cell.config) as live:
        rex = cell.perturbed(live, "rex", seed=0)
        trained = predict(base, "a <rex>")
    with applied(base, [rex]):
        torch.testing.assert_close(predict(base, "a <rex>"), trained, rtol=1e-3, atol=1e-4)
        assert base.sample(["a <rex>"], seeds=[0], steps=1)
    assert (trained - plain).abs().max() > 1e-4
    assert torch.equal(predict(base, "a dog"), plain)
    assert cell.is_untouched()


def test_merges(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SampledInputs", partial(calibration.SampledInputs, steps=1, seeds=1))
    monkeypatch.setattr(baseline_merges, "STEPS", dict.fromkeys(baseline_merges.STEPS, 2))
    base, both = cell.base, []
    for seed, name in enumerate(("rex", "tom")):
        with injected_concept(cell.concept, base, cell.interval, cell.config) as live:
            both.append(cell.perturbed(live, name, seed))
    assert list(find_method(cell.method).merges) == list(ROWS[cell.method].merges)
    for how, factor in ROWS[cell.method].merges.items():
        merged = merge(both, how=how, base=base)
        assert merged.spec.recipe["how"] == how
        assert merged.tokens.keys() == both[0].tokens.keys() | both[1].tokens.keys()
        merged.save(tmp_path / f"{how}.safetensors")
        assert_equal(Adapter.load(tmp_path / f"{how}.safetensors"), merged)
        with applied(base, [merged]):
            predict(base, "a <rex> and a <tom>")
        for key in {*merged.factors, *merged.dense} if factor else ():
            expected = (factor or 0.0) * (delta(both[0], key, base) + delta(both[1], key, base))
            torch.testing.assert_close(delta(merged, key, base), expected, rtol=1e-4, atol=1e-5)
    assert cell.is_untouched()


def assert_equal(one: Adapter, other: Adapter) -> None:
    assert_same(one, other)
    assert one.dense.keys() == other.dense.keys()
    for key, dense in one.dense.items():
        theirs = other.dense[key].parts()
        assert dense.parts().keys() == theirs.keys()
        assert all(torch.equal(part, theirs[name]) for name, part in dense.parts().items())


def delta(adapter: Adapter, key: str, base: Base) -> Tensor:
    """Return what an adapter adds to a layer's weight: (out, in)."""
    weight = base.layers[key].weight
    if key in adapter.dense:
        return adapter.dense[key].delta(weight)
    factor, result = adapter.factors[key], torch.zeros(weight.shape)
    return result.index_add_(1 if adapter.spec.side == "fa" else 0, factor.index, factor.weight)


@torch.no_grad()
def predict(base: Base, prompt: str) -> Tensor:
    size, channels = base.family.latent_size(base.pipeline), base.pipeline.vae.config.latent_channels
    noisy = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    return base.predict(noisy, torch.tensor([300]), base.encode_text(base.tokenize([prompt])))
