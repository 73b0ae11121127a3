"""Images with a prompt and concepts of its own for each region: no concept acts outside its region."""

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
from sbora_diffusion.inference.generate import TOKEN, check_tokens
from sbora_diffusion.inference.regional_attention import Branch, Scene, staged
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import TextConditioning
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import say_plainly

FEATHER = 0.1  # of the image's side
FORM = (
    'expected left,top,right,bottom: prompt, such as "0,0,.5,1: a <dog>", with fractions of the image from 0 to 1; '
    'concepts that the prompt does not name stand before the colon: "0,0,.5,1,ink: a house"'
)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the image with its own prompt.

    Attributes:
        box: left, top, right, bottom as fractions of the image's sides.
        adapters: names of concepts that act here though the prompt does not name them, such as styles without a token.
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
            raise SboraError("a region has no prompt", hint="Say what is to be there.")

    @property
    def text(self) -> str:
        """What `parse_region` makes a region of this box, these concepts and this prompt of."""
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
    """How much the global prompt (first) and each region have of every point: (height, width) each, together 1.

    A later region lies over an earlier one, as paint does; the global prompt has what no region covers.
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
    """One image a seed, with live concepts: each acts only where it is named, in the text and in the image.

    Without regions the concepts of the prompt act where their tokens' attention is. An image whose prompts name no
    concept is the one that `generate` makes of the base model, bit for bit; other loaded concepts never matter.

    Args:
        prompt: of what no region covers; the regions' prompts are theirs alone.
        regions: later ones lie over earlier ones.
        adapters: what the prompts may name, in any order.
        strengths: one factor an adapter, 1 for all if None.
        steps, guidance: None for what is usual for this base model.
        negative_prompt: no concept acts on it.

    Raises:
        SboraError: no seeds, steps or seeds that cannot be, an adapter of another base model, two with one name or
            token, an unknown or lost token.
    """
    if not seeds:
        raise SboraError("got no seeds, expected at least one")
    steps, guidance = base.choose_sampling(seeds, steps, guidance)
    with live_concepts(base, adapters, strengths) as live, base.arithmetic():
        check_tokens(base, [negative_prompt])
        side = base.resolution
        weights = region_weights(regions, (side, side))
        shares = [weight.to(base.device) for weight in weights]
        chosen = [(prompt, ()), *((region.prompt, region.adapters) for region in regions)]
        masks = [live.text_masks(text, names) for text, names in chosen]
        texts = [live.encode([text] * len(seeds), mask) for (text, _), mask in zip(chosen, masks, strict=True)]
        branches = [Branch(text.states, mask, share) for text, mask, share in zip(texts, masks, shares, strict=True)]
        silent = live.encode_negative(negative_prompt, len(seeds))
        named = live.token_positions(prompt)
        with _staged(base, live, branches, named, guidance):
            result: Any = base.pipeline(
                **_conditions(texts[0], silent),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            )
        return result.images


@contextmanager
def _staged(
    base: Base, live: LiveConcepts, branches: Sequence[Branch], named: Mapping[str, Sequence[int]], guidance: float
) -> Iterator[None]:
    """Let the U-Net draw these branches, and the concepts act where they are heard."""
    pipeline: Any = base.pipeline
    side = pipeline.unet.config.sample_size
    maps = AttentionMaps(named, (side, side)) if named else None
    num_uncond = len(branches[0].embeddings) if guidance > 1 else 0
    scene = Scene(branches, num_uncond, (side, side), maps)
    with staged(pipeline.unet, scene), live.acting(scene.masks):
        yield


def _conditions(text: TextConditioning, silent: TextConditioning) -> dict[str, Tensor]:
    """What the pipeline is given of the global prompt and of what guidance compares with; regions are heard inside."""
    given = {"prompt_embeds": text.states, "negative_prompt_embeds": silent.states}
    if text.pooled is not None and silent.pooled is not None:
        given |= {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": silent.pooled}
    return given


def whole_scene(prompt: str, regions: Sequence[Region], nouns: Mapping[str, str]) -> tuple[str, list[Region]]:
    """The prompt and the regions', each saying all of the image; a concept is named in its own region only.

    "on the beach" with the regions "a <dog>" and "a <cat>" becomes "a dog and a cat on the beach" with "a <dog> and a
    cat on the beach" and "a dog and a <cat> on the beach": a model that hears of one subject in each half draws two
    large ones that run into each other (docs/regions.md).

    Args:
        prompt: what is said of the whole image; may be empty, and stays as it is in every region.
        nouns: the class noun of each token.
    """
    told = [_plainly(region.prompt, nouns) for region in regions]

    def scene(subjects: Sequence[str]) -> str:
        return " ".join([" and ".join(subjects), prompt]).strip()

    own = [scene([*told[:n], region.prompt, *told[n + 1 :]]) for n, region in enumerate(regions)]
    return scene(told), [replace(region, prompt=words) for region, words in zip(regions, own, strict=True)]


def _plainly(prompt: str, nouns: Mapping[str, str]) -> str:
    for token in set(TOKEN.findall(prompt)).intersection(nouns):
        prompt = say_plainly(prompt, token, nouns[token])
    return prompt


def class_nouns(adapters: Iterable[Adapter]) -> dict[str, str]:
    """The class noun of each token that these bring."""
    return {token: noun for adapter in adapters for token, noun in adapter.spec.tokens.items()}
