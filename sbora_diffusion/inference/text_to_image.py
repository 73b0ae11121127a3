"""Images of a prompt with any adapters: the function behind `sbora.generate` and the generate command."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.inference.generate import generate as generate_batch
from sbora_diffusion.inference.image_file import Settings
from sbora_diffusion.inference.regions import Region, class_nouns, generate_regions, parse_region, whole_scene
from sbora_diffusion.library.library import Library, load_adapters
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.loading import EMBEDDED
from sbora_diffusion.utils.errors import SboraError

BATCH = 8  # images generated at once


def generate(
    prompt: str,
    adapters: Adapter | str | Path | Sequence[Adapter | str | Path] = (),
    *,
    base: Base | str = "",
    strengths: Sequence[float] | None = None,
    seeds: Iterable[int] = (0,),
    regions: Sequence[Region | str] = (),
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    gated: bool = False,
    whole_scene: bool = True,
    precision: str = "",
    library: Library | str | Path = "adapters",
    on_image: Callable[[Image.Image, Settings], None] | None = None,
) -> list[Image.Image]:
    """Generate one image per seed. The base model is left as it was.

    Args:
        adapters: adapters, names in the library, or paths.
        base: a loaded base model or its name; default: the one that the first adapter was trained for, or emoji64.
        strengths: one factor per adapter; None for 1.
        regions: regions with prompts of their own, such as "0,0,.5,1: a <dog>"; later ones lie over earlier ones.
        steps, guidance: None for the base model's defaults.
        gated: apply each concept only where the prompt names it, in the text and in the image.
        whole_scene: describe the whole scene in every region's prompt (docs/regions.md).
        precision: fp32, bf16, fp16 or nf4, of a base model that is given by name; default: what suits it.
        on_image: called with each image and its settings as soon as it is generated.

    Raises:
        SboraError: no seeds, an adapter of another base model, a `<token>` that no adapter provides, invalid settings.
    """
    found, listed = load_adapters(adapters, library), list(seeds)
    model = _loaded(base, found, precision)
    sampling = model.sampling
    settings = Settings(
        base=model.id,
        prompt=prompt,
        steps=sampling.steps if steps is None else steps,
        guidance=sampling.guidance if guidance is None else guidance,
        negative_prompt=negative_prompt,
        precision=model.precision,
        concepts={adapter.spec.name: x for adapter, x in zip(found, strengths or [1.0] * len(found), strict=False)},
        regions=tuple(region if isinstance(region, str) else region.text for region in regions),
        whole_scene=whole_scene,
        gated=gated,
    )
    images = []
    for image, made in _generate(model, found, strengths, listed, settings):
        images.append(image)
        if on_image:
            on_image(image, made)
    return images


def _loaded(base: Base | str, adapters: Sequence[Adapter], precision: str) -> Base:
    if isinstance(base, str):
        return load_base(base or (adapters[0].spec.base_id if adapters else EMBEDDED), precision)
    if precision and precision != base.precision:
        raise SboraError(f"got precision={precision} for a base model loaded in {base.precision}", "leave it out")
    return base


def _generate(
    base: Base, adapters: Sequence[Adapter], strengths: Sequence[float] | None, seeds: Sequence[int], settings: Settings
) -> Iterator[tuple[Image.Image, Settings]]:
    """Generate in batches; with regions or gating beside the weights, otherwise written into them."""
    if not seeds:
        raise SboraError("got no seeds, expected at least one")
    prompt, regions = settings.prompt, [parse_region(region) for region in settings.regions]
    if regions and settings.whole_scene:
        prompt, regions = whole_scene(prompt, regions, class_nouns(adapters))
    is_live = bool(regions) or settings.gated
    with nullcontext() if is_live else applied(base, adapters, strengths):
        for start in range(0, len(seeds), BATCH):
            batch = seeds[start : start + BATCH]
            options: dict[str, Any] = {"seeds": batch, **settings.sampling}
            if is_live:
                images = generate_regions(base, prompt, regions, adapters, strengths=strengths, **options)
            else:
                images = generate_batch(base, [prompt] * len(batch), **options)
            for seed, image in zip(batch, images, strict=True):
                yield image, replace(settings, seed=seed)
