"""Base models in half precision: half the memory, the same concept files, and nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.regions import Region, generate_regions
from sbora_diffusion.methods.registry import configure, find_method, method_names
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.loading import inference_precision
from sbora_diffusion.training.memory import activations, estimate
from sbora_diffusion.utils.errors import SboraError

from .conftest import SAVERS, SETTINGS, Life, last_of, make_concept, tiny_base, train_and_copy

each_family = pytest.mark.parametrize("life", [kind for kind in SAVERS if kind != "sd2"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def half(life: Life) -> Base:
    """The same base model in bf16."""
    return life.load("bf16")


def weights_of(base: Base) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": parameter.detach().clone()
        for number, module in enumerate(base.family.modules(base.pipeline))
        for name, parameter in module.named_parameters()
    }


def test_all_but_the_autoencoder_is_half_and_it_is_the_same_model(life: Life, half: Base) -> None:
    modules = half.family.modules(half.pipeline)
    dtypes = {module is half.pipeline.vae: {p.dtype for p in module.parameters()} for module in modules}
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert (half.fingerprint, half.layer_shapes) == (life.base.fingerprint, life.base.layer_shapes)


def test_its_images_are_those_of_fp32_but_for_rounding(life: Life, half: Base) -> None:
    def drawn(base: Base) -> np.ndarray:
        with applied(base, life.adapters):
            (image,) = generate(base, [life.prompt], seeds=[1], steps=2)
        return np.asarray(image, dtype=float)

    before = weights_of(half)
    difference = np.abs(drawn(half) - drawn(life.base)).mean()
    assert 0 < difference < 12  # of 255
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(half).items())


@each_family
def test_a_training_keeps_what_it_learns_in_fp32_and_leaves_nothing_behind(
    life: Life, half: Base, tmp_path: Path
) -> None:
    before, config, rex = weights_of(half), life.config(precision="bf16"), life.concepts[0]
    learned = train_and_copy(rex, half, Interval(0, 4), config, tmp_path / "whole", tmp_path / "cut")
    tensors = [factor.weight for factor in learned.factors.values()] + list(learned.tokens.values())
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all((tensor != tensor.to(torch.bfloat16).float()).any() for tensor in tensors if tensor.any())
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(half).items())

    resumed = last_of(rex, half, Interval(0, 4), config, tmp_path / "cut", resume=True)
    assert all(torch.equal(f.weight, resumed.factors[key].weight) for key, f in learned.factors.items())


def test_the_estimate_counts_half_the_weights(life: Life, half: Base) -> None:
    full, less = life.config(precision="fp32"), life.config(precision="bf16")
    in_vae = sum(parameter.numel() for parameter in life.base.pipeline.vae.parameters())
    everything = sum(weight.numel() for weight in weights_of(life.base).values())
    for base in (life.base, half):  # the advice is about settings, whatever is loaded
        kept = activations(base, full)
        assert estimate(base, full, kept).weights == 4 * everything
        assert estimate(base, less, kept).weights == 4 * in_vae + 2 * (everything - in_vae)
    assert activations(half, full).everything == activations(life.base, full).everything


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(tiny_base("sd", tmp_path_factory.mktemp("sd")).id, request.param)


@pytest.mark.parametrize("method", method_names())
def test_every_method_trains_on_it(method: str, small: Base, tmp_path: Path) -> None:
    base, before = small, weights_of(small)
    config = configure("sd", method, SETTINGS | {"precision": base.precision, "steps": "1", "learning_rate": "0.001"})
    interval = Interval(0, 4) if find_method(method).owns_interval else None
    concept = make_concept(tmp_path, "rex", "red")
    adapter = last_of(concept, base, interval, config, tmp_path / "run")
    assert all(torch.equal(weight, before[key]) for key, weight in weights_of(base).items())
    with applied(base, [adapter]):
        assert len(generate(base, ["a <rex>"], seeds=[0], steps=1)) == 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_regions_draw_with_it(kind: str, tmp_path: Path) -> None:
    base = load_base(tiny_base(kind, tmp_path).id, "bf16")
    regions = [Region(box=(0.0, 0.0, 0.5, 1.0), prompt="a dog")]
    (image,) = generate_regions(base, "a cat", regions, [], seeds=[0], steps=1)
    assert image.width == base.resolution


def test_what_is_drawn_in_where_nobody_says(life: Life) -> None:
    assert inference_precision(life.base.id, has_gpu=False) == "fp32"
    expected = "bf16" if life.base.family.name in ("sdxl", "sd3", "flux") else "fp32"
    assert inference_precision(life.base.id, has_gpu=True) == expected


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(SboraError, match="got precision=int8, expected one of fp32, bf16, fp16"):
        load_base("emoji64", "int8")
