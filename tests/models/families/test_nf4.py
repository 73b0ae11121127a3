"""Base models in four bits: less memory, the same concept files, and nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.linear_function import num_held
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.regions import Region, generate_regions
from sbora_diffusion.methods.registry import configure, find_method, method_names
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.quantization import BYTES, packable
from sbora_diffusion.training.memory import activations, advice, estimate
from sbora_diffusion.utils.errors import SboraError

from .conftest import SETTINGS, Life, last_of, make_concept, tiny_base, train_and_copy
from .test_half import each_family, weights_of


@pytest.fixture(scope="module")
def packed(life: Life) -> Base:
    """The same base model in nf4."""
    return life.load("nf4")


def drawn(base: Base, prompt: str) -> np.ndarray:
    (image,) = generate(base, [prompt], seeds=[1], steps=2)
    return np.asarray(image, dtype=float)


def test_what_learns_nothing_is_packed_and_it_is_the_same_model(life: Life, packed: Base) -> None:
    kinds = {
        module in packed.family.frozen(packed.pipeline): any(isinstance(m, Linear4bit) for m in module.modules())
        for module in packed.family.modules(packed.pipeline)
    }
    assert kinds == {True: True, False: False}
    assert all(isinstance(packed.layers[key], Linear4bit) for key in packed.layers if not key.startswith("text_enc"))
    assert (packed.fingerprint, packed.layer_shapes) == (life.base.fingerprint, life.base.layer_shapes)


def test_concepts_act_in_its_images_and_leave_no_trace(life: Life, packed: Base) -> None:
    before, plain = drawn(packed, "a cat"), drawn(packed, "a red house")
    with applied(packed, life.adapters) as written:
        with_both = drawn(packed, life.prompt)
        assert np.abs(with_both - drawn(life.base, "a red house")).mean() > 1
        with applied(life.base, life.adapters):
            full = drawn(life.base, life.prompt)
        assert np.abs(with_both - full).mean() < np.abs(plain - full).mean()
        written.restore([life.adapters[0].spec.name])
    assert np.array_equal(drawn(packed, "a cat"), before)


@each_family
def test_a_training_leaves_nothing_behind_and_goes_on_bit_for_bit(life: Life, packed: Base, tmp_path: Path) -> None:
    before, config, rex = weights_of(packed), life.config(precision="nf4"), life.concepts[0]
    learned = train_and_copy(rex, packed, Interval(0, 4), config, tmp_path / "whole", tmp_path / "cut")
    assert any(factor.weight.any() for factor in learned.factors.values())
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(packed).items())
    resumed = last_of(rex, packed, Interval(0, 4), config, tmp_path / "cut", resume=True)
    assert all(torch.equal(f.weight, resumed.factors[key].weight) for key, f in learned.factors.items())
    with applied(life.base, [learned]):  # the file is for the base model, however that is held
        drawn(life.base, "a <rex>")


def test_the_estimate_is_of_packed_weights(life: Life, packed: Base) -> None:
    half, four = life.config(precision="bf16"), life.config(precision="nf4")
    layers = [layer for model in packed.family.frozen(packed.pipeline) for layer in packable(model).values()]
    saved = sum(num_held(layer.weight) for layer in layers) * (2 - BYTES)
    for base in (life.base, packed):
        kept = activations(base, half)
        assert estimate(base, half, kept).weights - estimate(base, four, kept).weights == pytest.approx(saved, abs=2)
    assert "precision=nf4" in advice(life.base, half, activations(life.base, half))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(tiny_base("sd", tmp_path_factory.mktemp("sd")).id, "nf4")


@pytest.mark.parametrize("method", method_names())
def test_methods_train_on_it_or_say_why_not(method: str, small: Base, tmp_path: Path) -> None:
    settings = SETTINGS | {"precision": "nf4", "steps": "1", "learning_rate": "0.001"}
    if find_method(method).reads_weights or method == "blocklora":
        with pytest.raises(SboraError, match="reads whole weights, which nf4 does not hold"):
            configure("sd", method, settings)
        return
    config = configure("sd", method, settings)
    interval = Interval(0, 4) if find_method(method).owns_interval else None
    adapter = last_of(make_concept(tmp_path, "rex", "red"), small, interval, config, tmp_path / "run")
    with applied(small, [adapter]):
        assert len(generate(small, ["a <rex>"], seeds=[0], steps=1)) == 1


def test_regions_draw_with_it(tmp_path: Path) -> None:
    base = load_base(tiny_base("sdxl", tmp_path).id, "nf4")
    config = configure("sdxl", "sbora-fa", SETTINGS | {"precision": "nf4", "steps": "1"})
    adapter = last_of(make_concept(tmp_path, "rex", "red"), base, Interval(0, 4), config, tmp_path / "run")
    regions = [Region(box=(0.0, 0.0, 0.5, 1.0), prompt="a <rex>")]
    (image,) = generate_regions(base, "a cat", regions, [adapter], seeds=[0], steps=1)
    assert image.width == base.resolution


def test_not_in_shares() -> None:
    with pytest.raises(SboraError, match="nf4 cannot be sharded"):
        load_base("emoji64", "nf4", sharded=True)
