"""Images with separate prompts and concepts for each region; no concept acts outside its region."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.attention_maps import AttentionMaps
from sbora_diffusion.inference.gating import LiveConcepts, live_concepts
from sbora_diffusion.inference.generate import check_tokens
from sbora_diffusion.inference.regional_attention import Branch, RegionalAttention, regional_attention
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import TextConditioning
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import say_plainly, tokens_in

FEATHER = 0.1  # of the image's side
FORM = (
    'expected left,top,right,bottom: prompt, such as "0,0,.5,1: a <dog>", in fractions of the image from 0 to 1; '
    'concepts that the prompt does not name go before the colon: "0,0,.5,1,ink: a house"'
)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the image with its own prompt.

    Attributes:
        box: left, top, right, bottom as fractions of the image's sides.
        adapters: names of concepts that act here although the prompt does not name them, such as styles without token.
        feather: width of the soft border, as a fraction of the image's side; the image's own border is never soft.
    """

    box: tuple[float, float, float, float]
    prompt: str
    adapters: tuple[str, ...] = ()
    feather: float = FEATHER

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            given = ",".join(f"{x:g}" for x in self.box)
            raise SboraError(f"got the box {given}, expected left < right and top < bottom, from 0 to 1")
        if not 0 <= self.feather <= 1:
            raise SboraError(f"got feather {self.feather}, expected a number from 0 to 1")
        if not self.prompt.strip():
            raise SboraError("a region has no prompt", hint="Describe what to show there.")

    @property
    def text(self) -> str:
        """The text from which `parse_region` makes this region, with the default feather."""
        return f"{','.join([*(f'{x:g}' for x in self.box), *self.adapters])}: {self.prompt}"


def parse_region(text: str) -> Region:
    """ "0,0,.5,1: a <dog>" is the left half with that prompt; "0,0,.5,1,ink: a house" has the concept ink there."""
    place, colon, prompt = text.partition(":")
    numbers, names = place.split(",")[:4], [name.strip() for name in place.split(",")[4:]]
    try:
        left, top, right, bottom = (float(part) for part in numbers)
    except ValueError:
        raise SboraError(f"got the region {text!r}, {FORM}") from None
    if not colon or not all(names):
        raise SboraError(f"got the region {text!r}, {FORM}")
    return Region(box=(left, top, right, bottom), prompt=prompt.strip(), adapters=tuple(names))


def region_weights(regions: Sequence[Region], size: tuple[int, int]) -> list[Tensor]:
    """Return the weight of the global prompt (first) and of each region at every point: (height, width), sum 1.

    A later region covers an earlier one; the global prompt gets what no region covers.
    """
    left_over, weights = torch.ones(size), []
    for region in reversed(regions):
        alpha = _alpha(region, size)
        weights.insert(0, left_over * alpha)
        left_over = left_over * (1 - alpha)
    return [left_over, *weights]


def _alpha(region: Region, size: tuple[int, int]) -> Tensor:
    left, top, right, bottom = region.box
    across = _ramp(left, right, region.feather, size[1])
    return torch.minimum(_ramp(top, bottom, region.feather, size[0])[:, None], across)


def _ramp(start: float, stop: float, feather: float, length: int) -> Tensor:
    """(length,): 1 inside, 0 outside, a straight slope of width `feather` on each border inside the image."""
    points = (torch.arange(length) + 0.5) / length
    inside = torch.full_like(points, torch.inf)
    if start > 0:
        inside = torch.minimum(inside, points - start)
    if stop < 1:
        inside = torch.minimum(inside, stop - points)
    return (inside / feather + 0.5).clamp(0, 1) if feather else (inside >= 0).float()


def generate_regions(
    base: Base,
    prompt: str,
    regions: Sequence[Region],
    adapters: Sequence[Adapter],
    *,
    seeds: Sequence[int],
    strengths: Sequence[float] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
) -> list[Image.Image]:
    """Generate one image per seed, with live concepts: each acts only where it is named, in the text and in the image.

    Without regions, the concepts of the prompt act where the attention to their tokens is. If no prompt names a
    concept, the image is the base model's, bit for bit; concepts that are loaded but not named change nothing.

    Args:
        prompt: for what no region covers.
        regions: later ones cover earlier ones.
        adapters: concepts that the prompts may name, in any order.
        strengths: one factor per adapter; None for 1.
        steps, guidance: None for the base model's defaults.
        negative_prompt: no concept acts on it.

    Raises:
        SboraError: no seeds, invalid steps or seeds, an adapter of another base model, two with the same name or
            token, an unknown token or one beyond the end of a long prompt.
    """
    if not seeds:
        raise SboraError("got no seeds, expected at least one")
    steps, guidance = base.choose_sampling(seeds, steps, guidance)
    with live_concepts(base, adapters, strengths) as live, base.arithmetic(), base.finite_pixels():
        check_tokens(base, [negative_prompt])
        side = base.resolution
        weights = region_weights(regions, (side, side))
        shares = [weight.to(base.device) for weight in weights]
        chosen = [(prompt, ()), *((region.prompt, region.adapters) for region in regions)]
        masks = [live.text_masks(text, names) for text, names in chosen]
        texts = [live.encode([text] * len(seeds), mask) for (text, _), mask in zip(chosen, masks, strict=True)]
        branches = [Branch(text.states, mask, share) for text, mask, share in zip(texts, masks, shares, strict=True)]
        uncond = live.encode_negative(negative_prompt, len(seeds))
        named = live.token_positions(prompt)
        with _regional(base, live, branches, named, guidance):
            result: Any = base.pipeline(
                **_conditions(texts[0], uncond),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            )
        return result.images


@contextmanager
def _regional(
    base: Base, live: LiveConcepts, branches: Sequence[Branch], named: Mapping[str, Sequence[int]], guidance: float
) -> Iterator[None]:
    """Make the U-Net attend to these branches, and the concepts act where they apply."""
    pipeline: Any = base.pipeline
    side = pipeline.unet.config.sample_size
    maps = AttentionMaps(named, (side, side)) if named else None
    num_uncond = len(branches[0].embeddings) if guidance > 1 else 0
    regions = RegionalAttention(branches, num_uncond, (side, side), maps)
    with regional_attention(pipeline.unet, regions), live.acting(regions.masks):
        yield


def _conditions(text: TextConditioning, uncond: TextConditioning) -> dict[str, Tensor]:
    """Return the pipeline's arguments for the global prompt and the negative one; regions act inside the U-Net."""
    given = {"prompt_embeds": text.states, "negative_prompt_embeds": uncond.states}
    if text.pooled is not None and uncond.pooled is not None:
        given |= {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": uncond.pooled}
    return given


def whole_scene(prompt: str, regions: Sequence[Region], nouns: Mapping[str, str]) -> tuple[str, list[Region]]:
    """Make the prompt and every region's describe the whole image; a concept is named in its own region only.

    "on the beach" with the regions "a <dog>" and "a <cat>" becomes "a dog and a cat on the beach" with "a <dog> and a
    cat on the beach" and "a dog and a <cat> on the beach". A prompt with one subject in each half yields two large
    ones that run into each other (docs/regions.md).

    Args:
        prompt: applies to the whole image; may be empty, and is repeated in every region.
        nouns: the class noun of each token.
    """
    plain = [_plainly(region.prompt, nouns) for region in regions]

    def scene(subjects: Sequence[str]) -> str:
        return " ".join([" and ".join(subjects), prompt]).strip()

    own = [scene([*plain[:n], region.prompt, *plain[n + 1 :]]) for n, region in enumerate(regions)]
    return scene(plain), [replace(region, prompt=words) for region, words in zip(regions, own, strict=True)]


def _plainly(prompt: str, nouns: Mapping[str, str]) -> str:
    for token in set(tokens_in(prompt)).intersection(nouns):
        prompt = say_plainly(prompt, token, nouns[token])
    return prompt


def class_nouns(adapters: Iterable[Adapter]) -> dict[str, str]:
    """Return the class noun of each token of these adapters."""
    return {token: noun for adapter in adapters for token, noun in adapter.spec.tokens.items()}
