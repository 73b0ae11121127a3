"""Regions: each position attends to its own prompt, each concept acts in its own region, later ones lie on top."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.gating import live_concepts
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.inference.regional_attention import (
    Branch,
    BranchedAttention,
    RegionalAttention,
    regional_attention,
)
from sbora_diffusion.inference.regions import (
    Region,
    generate_regions,
    parse_region,
    region_weights,
    whole_scene,
)
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.utils.errors import SboraError

from .test_bake import concept

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(params=["tiny_folder", "tiny_sd2_folder"], ids=["sd1", "sd2"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(str(request.getfixturevalue(request.param)))


@pytest.fixture
def adapters(base: Base) -> list[Adapter]:
    return [concept(base, "rex", "fa", "0:4"), concept(base, "tom", "fb", "2:6", vectors=2)]


def draw(base: Base, prompt: str, regions: Sequence[Region], adapters: Sequence[Adapter] = ()) -> np.ndarray:
    images = generate_regions(base, prompt, regions, adapters, seeds=[0, 1], steps=3)
    return np.stack([np.asarray(image, int) for image in images])


@pytest.mark.parametrize(
    ("text", "box", "prompt"),
    [
        ("0,0,.5,1: a <dog>", LEFT, "a <dog>"),
        (" 0.25 , 0 , 1 , 0.75:a cat: black", (0.25, 0.0, 1.0, 0.75), "a cat: black"),
    ],
)
def test_a_region_as_text(text: str, box: tuple[float, ...], prompt: str) -> None:
    assert parse_region(text) == Region(box=box, prompt=prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [(), ("ink",), ("ink", "soft light")])
def test_a_region_as_text_parses_to_itself(names: tuple[str, ...]) -> None:
    region = Region(box=(0.05, 0.1, 0.45, 1.0), prompt="a <dog>: asleep", adapters=names)
    assert region.text == f"{','.join(['0.05,0.1,0.45,1', *names])}: a <dog>: asleep"
    assert parse_region(region.text) == region


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0,.5: a dog", "expected left,top,right,bottom: prompt"),
        ("0,0,half,1: a dog", "expected left,top,right,bottom: prompt"),
        ("0,0,.5,1", "expected left,top,right,bottom: prompt"),
        ("0,0,.5,1: ", "has no prompt"),
        ("0,0,.5,1,: a dog", "expected left,top,right,bottom: prompt"),
        (".5,0,.5,1: a dog", r"got the box 0.5,0,0.5,1, expected left < right"),
        ("0,.6,1,.4: a dog", r"expected left < right and top < bottom"),
        ("0,0,64,64: a dog", r"got the box 0,0,64,64"),
        ("nan,0,1,1: a dog", r"got the box nan"),
    ],
)
def test_invalid_regions(text: str, message: str) -> None:
    with pytest.raises(SboraError, match=message):
        parse_region(text)


def test_feather_has_its_limits() -> None:
    with pytest.raises(SboraError, match="got feather 2"):
        Region(box=LEFT, prompt="a", feather=2)


def test_weights_with_hard_borders() -> None:
    """A later region lies over an earlier one, the global prompt has the rest."""
    below = Region(box=LEFT, prompt="a", feather=0)
    above = Region(box=(0.25, 0.0, 0.75, 0.5), prompt="b", feather=0)
    rest, first, second = (weight.tolist() for weight in region_weights([below, above], (2, 4)))
    assert rest == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert first == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert second == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_soft_borders() -> None:
    """A straight slope around the border of .5, none at the image's own border; everything adds up to one."""
    left, right = Region(box=LEFT, prompt="a", feather=0.5), Region(box=RIGHT, prompt="b", feather=0.5)
    rest, of_left = region_weights([left], (3, 8))
    expected = torch.tensor([1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0]).expand(3, -1)
    torch.testing.assert_close(of_left, expected)
    torch.testing.assert_close(rest, 1 - expected)
    torch.testing.assert_close(torch.stack(region_weights([left, right], (3, 8))).sum(0), torch.ones(3, 8))


def test_no_region_is_plain(base: Base) -> None:
    expected = np.stack([np.asarray(image) for image in generate(base, ["a dog"] * 2, seeds=[0, 1], steps=3)])
    assert np.array_equal(draw(base, "a dog", ()), expected)


def test_one_region_over_everything_is_its_prompt(base: Base) -> None:
    expected, region = draw(base, "a dog", ()), Region(box=WHOLE, prompt="a dog")
    assert np.abs(draw(base, "something else", [region]) - expected).max() <= 1
    assert np.abs(draw(base, "something else", ()) - expected).max() > 1


def test_the_order_of_overlapping_regions_decides(base: Base) -> None:
    one, other = Region(box=WHOLE, prompt="a dog"), Region(box=WHOLE, prompt="cats")
    assert np.abs(draw(base, "x", [one, other]) - draw(base, "cats", ())).max() <= 1
    assert np.abs(draw(base, "x", [other, one]) - draw(base, "a dog", ())).max() <= 1


def test_loaded_concepts_that_no_region_names_change_nothing(base: Base, adapters: list[Adapter]) -> None:
    regions = [Region(box=LEFT, prompt="a dog"), Region(box=RIGHT, prompt="a <rex>")]
    alone = draw(base, "a cat", regions, adapters[:1])
    assert np.array_equal(draw(base, "a cat", regions, adapters[::-1]), alone)
    nobody = [Region(box=LEFT, prompt="a dog"), Region(box=RIGHT, prompt="a mouse")]
    assert np.array_equal(draw(base, "a cat", nobody, adapters), draw(base, "a cat", nobody))


def test_a_chosen_style_acts_without_a_token(base: Base, adapters: list[Adapter]) -> None:
    style = replace(adapters[0], spec=replace(adapters[0].spec, tokens={}, name="style"), tokens={})
    regions = [Region(box=LEFT, prompt="a dog"), Region(box=RIGHT, prompt="a cat")]
    chosen = [regions[0], replace(regions[1], adapters=("style",))]
    plain = draw(base, "x", regions)
    assert np.array_equal(draw(base, "x", regions, [style]), plain)
    assert not np.array_equal(draw(base, "x", chosen, [style]), plain)
    with pytest.raises(SboraError, match="got concept 'style', loaded are rex"):
        draw(base, "x", chosen, adapters[:1])


def test_a_concept_acts_in_its_region_only(base: Base, adapters: list[Adapter]) -> None:
    """The first self-attention sees the same input with and without the concept: its value changes inside only."""
    found = [first_values(base, adapters, strength) for strength in (0.0, 1.0)]
    changed = (found[0] != found[1]).any(-1)  # (rows, positions)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:, 4:] = True
    assert not changed[0].any()
    assert torch.equal(changed[1].view(8, 8), inside)


@torch.no_grad()
def first_values(base: Base, adapters: list[Adapter], strength: float) -> Tensor:
    """(negative and positive, positions, channels) of the first self-attention, with <rex> on the right."""
    unet: Any = base.pipeline.unet
    seen: list[Tensor] = []
    with live_concepts(base, adapters, [strength, 1.0]) as live:
        masks = live.text_masks("a <rex>")
        region = Region(box=RIGHT, prompt="a <rex>", feather=0)
        weights = region_weights([region], (8, 8))
        text = live.encode(["a"], {}).states
        branches = [Branch(text, {}, weights[0]), Branch(text, masks, weights[1])]
        regional = RegionalAttention(branches, 1, (8, 8), None)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
        value = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_v
        handle = value.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
        with regional_attention(unet, regional), live.acting(regional.masks):
            unet(latents, torch.tensor(500), branches[0].embeddings.repeat(2, 1, 1))
        handle.remove()
    return seen[0]


def test_branches_are_masked_cross_attention() -> None:
    """Hard regions: the same as one softmax per position over the tokens of its own prompt, all others masked out."""
    torch.manual_seed(0)
    attention = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    weights = region_weights([Region(box=RIGHT, prompt="a", feather=0)], (4, 4))
    texts, hidden = [torch.randn(1, 5, 6) for _ in weights], torch.randn(2, 16, 8)
    uncond = torch.randn(1, 5, 6)
    regional = RegionalAttention(
        [Branch(text, {}, weight) for text, weight in zip(texts, weights, strict=True)], 1, (4, 4), None
    )
    with torch.no_grad():
        found = BranchedAttention(AttnProcessor2_0(), regional)(attention, hidden, torch.cat([uncond, texts[0]]))
        expected = AttnProcessor2_0()(attention, hidden[:1], uncond)
        torch.testing.assert_close(found[:1], expected)
        torch.testing.assert_close(found[1:], masked_attention(attention, hidden[1:], texts, weights))


def masked_attention(attention: Any, hidden: Tensor, texts: list[Tensor], weights: list[Tensor]) -> Tensor:
    """All tokens in one sequence, and a mask of which position may see which."""
    query, text = attention.to_q(hidden), torch.cat(texts, 1)
    heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (query, attention.to_k(text), attention.to_v(text))]
    mask = torch.cat([weight.flatten()[:, None].bool().expand(-1, 5) for weight in weights], 1)  # (16, 10)
    return attention.to_out[0](F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))


SCENE = (
    Region(box=(0, 0, 0.5, 1), prompt="a <dog>", adapters=("ink",)),
    Region(box=(0.5, 0, 1, 1), prompt="a <cat>"),
)
NOUNS = {"<dog>": "dog", "<cat>": "cat"}


def test_a_concept_is_named_in_its_own_region_only() -> None:
    prompt, (left, right) = whole_scene("on the beach", SCENE, NOUNS)
    assert prompt == "a dog and a cat on the beach"
    assert (left.prompt, right.prompt) == ("a <dog> and a cat on the beach", "a dog and a <cat> on the beach")
    assert (left.box, left.adapters, right.feather) == (SCENE[0].box, ("ink",), SCENE[1].feather)


def test_a_noun_has_the_article_it_needs() -> None:
    octopus = Region(box=(0, 0, 0.5, 1), prompt="a <octopus>")
    prompt, _ = whole_scene("on the beach", [octopus, SCENE[1]], NOUNS | {"<octopus>": "octopus"})
    assert prompt == "an octopus and a cat on the beach"


def test_an_empty_global_prompt() -> None:
    prompt, (left, right) = whole_scene("", SCENE, NOUNS)
    assert (prompt, left.prompt, right.prompt) == ("a dog and a cat", "a <dog> and a cat", "a dog and a <cat>")


def test_an_unknown_token_is_kept() -> None:
    assert whole_scene("", SCENE[:1], {})[0] == "a <dog>"
