"""What `generate` does: with concepts written into the base model, or live where regions or gating are asked for."""

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from sbora_diffusion.adapter.file import Adapter
from sbora_diffusion.diffusion.base import load_base
from sbora_diffusion.diffusion.generate import applied, generate
from sbora_diffusion.diffusion.regions import generate_regions, parse_region
from sbora_diffusion.diffusion.whole_scene import class_nouns, whole_scene

BATCH = 8  # pictures generated at once


def pictures(
    base_name: str,
    prompt: str,
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    seeds: Sequence[int],
    regions: Sequence[str],
    gated: bool,
    scene: bool,
    options: dict[str, Any],
) -> Iterator[Image.Image]:
    """One picture a seed.

    Args:
        regions: as `parse_region` reads them.
        gated: let each concept act only where it is named; with regions that is always so.
        scene: tell every region of the whole scene, or let its prompt be all that it hears.
        options: steps, guidance and negative_prompt, where they are not the defaults.
    """
    parsed = [parse_region(region) for region in regions]
    base = load_base(base_name or (adapters[0].spec.base_id if adapters else "emoji64"))
    batches = [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]
    if parsed and scene:
        prompt, parsed = whole_scene(prompt, parsed, class_nouns(adapters))
    if parsed or gated:
        for batch in batches:
            yield from generate_regions(base, prompt, parsed, adapters, strengths=strengths, seeds=batch, **options)
        return
    with applied(base, adapters, strengths):
        for batch in batches:
            yield from generate(base, [prompt] * len(batch), seeds=batch, **options)
