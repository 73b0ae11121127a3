"""Token gating: who is not named changes nothing, bit for bit; who is acts at and after its token, nowhere else."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.inference.gating import add_delta, live_concepts
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.regional_attention import Branch, RegionalAttention, regional_attention
from sbora_diffusion.inference.regions import generate_regions
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.utils.errors import SboraError

from .test_bake import concept, state


@pytest.fixture(params=["tiny_folder", "tiny_sd2_folder"], ids=["sd1", "sd2"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(str(request.getfixturevalue(request.param)))


@pytest.fixture
def adapters(base: Base) -> list[Adapter]:
    """Both sides, shared columns, a token of two vectors."""
    return [
        concept(base, "rex", "fa", "0:4"),
        concept(base, "tom", "fb", "2:6", vectors=2),
        concept(base, "kimi", "fa", "2:6"),
    ]


def draw(base: Base, prompt: str, adapters: Sequence[Adapter], **settings: Any) -> np.ndarray:
    images = generate_regions(base, prompt, (), adapters, **({"seeds": [0, 1], "steps": 3} | settings))
    return np.stack([np.asarray(image) for image in images])


def draw_base(base: Base, prompt: str, **settings: Any) -> np.ndarray:
    images = generate(base, [prompt] * 2, **({"seeds": [0, 1], "steps": 3} | settings))
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_prompt_that_names_none_gives_the_base_models_image(
    base: Base, adapters: list[Adapter], number: int, guidance: float
) -> None:
    expected = draw_base(base, "a dog", guidance=guidance, negative_prompt="cat")
    found = draw(base, "a dog", adapters[:number], guidance=guidance, negative_prompt="cat")
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_naming_one_gives_the_image_of_that_one_alone(base: Base, adapters: list[Adapter], which: int) -> None:
    prompt = f"a <{adapters[which].spec.name}>"
    alone = draw(base, prompt, [adapters[which]])
    assert np.array_equal(draw(base, prompt, adapters), alone)
    assert np.array_equal(draw(base, prompt, adapters[::-1]), alone)
    assert not np.array_equal(draw(base, prompt, adapters, strengths=[0.0] * 3), alone)


def test_two_named_do_not_depend_on_their_order(base: Base, adapters: list[Adapter]) -> None:
    both = draw(base, "a <rex> and a <tom>", adapters)
    assert np.array_equal(draw(base, "a <rex> and a <tom>", adapters[:2][::-1]), both)


def test_strength_zero_is_the_base_model_with_the_token(base: Base, adapters: list[Adapter]) -> None:
    with applied(base, adapters[:1], [0.0]):
        expected = draw_base(base, "a <rex>")
    assert np.array_equal(draw(base, "a <rex>", adapters[:1], strengths=[0.0]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(base: Base, adapters: list[Adapter], dtype: torch.dtype) -> None:
    assert base.fingerprint  # of the fp32 weights, before they are rounded
    base.pipeline.to(dtype)
    plain = draw_base(base, "a dog")
    assert plain.std() > 0
    assert np.array_equal(draw(base, "a dog", adapters), plain)
    assert not np.array_equal(draw(base, "a <rex>", adapters), draw(base, "a <rex>", adapters, strengths=[0.0] * 3))


def test_nothing_stays_behind(base: Base, adapters: list[Adapter]) -> None:
    before, tokenizer = state(base), base.pipeline.tokenizer
    processors = dict(base.pipeline.unet.attn_processors)
    draw(base, "a <rex> and a <tom>", adapters)
    with pytest.raises(SboraError, match="no loaded concept brings the token <bob>"):
        draw(base, "a <bob>", adapters)
    after = state(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert base.pipeline.tokenizer is tokenizer
    assert base.pipeline.unet.attn_processors == processors
    assert not any(layer._forward_hooks for layer in base.layers.values())
    assert not base.pipeline.unet._forward_pre_hooks


@pytest.mark.parametrize("side", ["fa", "fb"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_a_delta_is_the_dense_one_where_the_mask_is(side: Side, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 5, 6, generator=generator), torch.randn(2, 5, 4, generator=generator).to(dtype)
    index = torch.tensor([3, 0])
    weight = torch.randn((4, 2) if side == "fa" else (2, 6), generator=generator)
    mask = torch.tensor([[0.0, 1, 0.5, 0, 0], [0, 0, 0, 0, 2]])
    dense = torch.zeros(4, 6)
    dense[:, index] = weight if side == "fa" else dense[:, index]
    if side == "fb":
        dense[index] = weight
    expected = output.float() + mask[..., None] * (x.to(dtype).float() @ dense.T)
    found = output.clone()
    add_delta(found, x.to(dtype), mask, Factor(index, weight.to(dtype)), side)
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found[mask == 0], output[mask == 0])
    assert not torch.equal(found[mask > 0], output[mask > 0])


def test_the_text_encoder_changes_at_and_after_the_token(base: Base, adapters: list[Adapter]) -> None:
    prompt = "a <tom> b"
    with live_concepts(base, adapters) as live:
        masks = live.text_masks(prompt)
        plain, named = (live.encode([prompt], acting).states for acting in ({}, masks))
        assert live.token_positions(prompt) == {"tom": [2, 3]}  # after the start and "a"
    assert masks.keys() == {"tom"}
    assert masks["tom"].tolist() == [0.0, 0.0, *[1.0] * 22]
    assert torch.equal(plain[:, :2], named[:, :2])
    assert (plain[:, 2:] != named[:, 2:]).any(-1).all()


def test_live_everywhere_is_written(base: Base, adapters: list[Adapter]) -> None:
    """Without gating a live concept does what a written one does, up to rounding."""
    latents, time, prompt = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 500, "a <rex> <tom>"
    with live_concepts(base, adapters[:2], [1.0, 0.5]) as live:
        live_text = live.encode([prompt], {name: torch.ones(1) for name in ("rex", "tom")}).states
        with live.acting(lambda _key, shape: {name: torch.ones(shape) for name in ("rex", "tom")}):
            live_noise = predict(base, latents, time, live_text)
    with applied(base, adapters[:2], [1.0, 0.5]):
        pipeline: Any = base.pipeline
        text = pipeline.encode_prompt([prompt], base.device, 1, False)[0]
        noise = predict(base, latents, time, text)
    torch.testing.assert_close(live_text, text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(live_noise, noise, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def predict(base: Base, latents: Tensor, time: int, text: Tensor) -> Tensor:
    return base.pipeline.unet(latents, torch.tensor(time), text).sample


def test_the_negative_half_is_untouched(base: Base, adapters: list[Adapter]) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    with live_concepts(base, adapters) as live:
        masks = live.text_masks("a <rex>")
        positive, negative = live.encode(["a <rex>"], masks).states, live.encode([""], {}).states
        text = torch.cat([negative, positive])
        silent = predict(base, latents, 500, text)
        regional = RegionalAttention([Branch(positive, masks, torch.ones(8, 8))], 1, (8, 8), None)
        with regional_attention(base.pipeline.unet, regional), live.acting(regional.masks):
            found = predict(base, latents, 500, text)
    assert torch.equal(found[0], silent[0])
    assert not torch.equal(found[1], silent[1])


def test_a_concept_named_by_the_negative_prompt_brings_its_token_only(base: Base, adapters: list[Adapter]) -> None:
    with applied(base, adapters, [0.0] * 3):
        expected = draw_base(base, "a dog", negative_prompt="a <rex>")
    assert np.array_equal(draw(base, "a dog", adapters, negative_prompt="a <rex>"), expected)


def test_mistakes_are_named(base: Base, adapters: list[Adapter]) -> None:
    rex, tom, _ = adapters
    same_token = replace(rex, spec=replace(rex.spec, name="other"))
    foreign = replace(rex, spec=replace(rex.spec, base_fingerprint="0" * 16))
    for chosen, prompt, settings, message in (
        ([rex, same_token], "a", {}, "two adapters bring the token '<rex>'"),
        ([rex, rex], "a", {}, "two adapters bring the name 'rex'"),
        ([foreign], "a", {}, "was trained for"),
        ([rex, tom], "a", {"strengths": [1.0]}, "2 adapters and 1 strengths"),
        ([rex], "a", {"seeds": []}, "no seeds"),
        ([rex], "a", {"seeds": [2**63]}, "got the seed 9223372036854775808"),
        ([rex], "a", {"strengths": [float("nan")]}, "got the strength nan"),
        ([rex], "b" * 30 + " <rex>", {}, "too long: <rex> is beyond its 24 tokens"),
        ([rex], "a <tom>", {}, "no loaded concept brings the token <tom>"),
        ([rex], "a", {"negative_prompt": "a <tom>"}, "no loaded concept brings the token <tom>"),
    ):
        with pytest.raises(SboraError, match=message):
            draw(base, prompt, chosen, **settings)
