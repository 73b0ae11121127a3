"""What `generate` does: with concepts written into the base model, or live where regions or gating are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_file import Settings
from sbora_diffusion.inference.regions import generate_regions, parse_region
from sbora_diffusion.inference.whole_scene import class_nouns, whole_scene
from sbora_diffusion.models.base import load_base

BATCH = 8  # images generated at once


def images(
    base_name: str,
    prompt: str,
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    seeds: Sequence[int],
    regions: Sequence[str],
    options: Mapping[str, Any],
) -> Iterator[tuple[Image.Image, Settings]]:
    """One image a seed, and what it was made with.

    Args:
        regions: as `parse_region` reads them.
        options: the fields of `Settings` that are asked for besides.
    """
    parsed = [parse_region(region) for region in regions]
    base = load_base(base_name or (adapters[0].spec.base_id if adapters else "emoji64"), options.get("precision", ""))
    concepts = {adapter.spec.name: strength for adapter, strength in zip(adapters, strengths, strict=False)}
    own = {"base": base.id, "precision": base.precision, "concepts": concepts, "regions": tuple(regions)}
    made = Settings(prompt=prompt, **{**vars(base.sampling), **options, **own})
    if parsed and made.whole_scene:
        prompt, parsed = whole_scene(prompt, parsed, class_nouns(adapters))
    batches = [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]
    if parsed or made.gated:
        draw = partial(generate_regions, base, prompt, parsed, adapters, strengths=strengths, **made.sampling)
        for batch in batches:
            yield from _told(draw(seeds=batch), batch, made)
        return
    with applied(base, adapters, strengths):
        for batch in batches:
            yield from _told(generate(base, [prompt] * len(batch), seeds=batch, **made.sampling), batch, made)


def _told(drawn: Sequence[Image.Image], seeds: Sequence[int], made: Settings) -> Iterator[tuple[Image.Image, Settings]]:
    for image, seed in zip(drawn, seeds, strict=True):
        yield image, replace(made, seed=seed)
