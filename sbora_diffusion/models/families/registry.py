"""All families, and the short names of well-known base models."""

from typing import Any

from sbora_diffusion.models.families.base import Family
from sbora_diffusion.models.families.transformer import FLUX, SD3
from sbora_diffusion.models.families.unet import SD, SDXL
from sbora_diffusion.utils.errors import SboraError

FAMILIES: tuple[Family, ...] = (SD, SDXL, SD3, FLUX)
ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
}


def family_of(pipeline: Any) -> Family:
    """Return the family of a loaded pipeline, also of another task: StableDiffusionXLImg2ImgPipeline is SDXL's."""
    name = type(pipeline).__name__
    related = [family for family in FAMILIES if name.startswith(family.pipeline.removesuffix("Pipeline"))]
    return max(related, key=lambda family: len(family.pipeline)) if related else family_named(name)


def family_named(pipeline: str) -> Family:
    """The family of a class of pipelines, such as "StableDiffusionXLPipeline"."""
    for family in FAMILIES:
        if family.pipeline == pipeline:
            return family
    known = ", ".join(family.pipeline for family in FAMILIES)
    raise SboraError(f"the base model is a {pipeline}, which no training is written for", f"known are {known}")
