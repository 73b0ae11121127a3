"""Kinds of base models: a file for each, imported when a base model of that kind is loaded, and a row in FAMILIES."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.models.families.base import Family

FAMILIES = {  # class of the pipeline in diffusers -> module and name of its family
    "StableDiffusionPipeline": ("unet", "SD"),
    "StableDiffusionXLPipeline": ("unet", "SDXL"),
    "StableDiffusion3Pipeline": ("transformer", "SD3"),
    "FluxPipeline": ("transformer", "FLUX"),
}
ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
}


def family_of(pipeline: Any) -> "Family":
    """Return the family of a loaded pipeline, also of another task: StableDiffusionXLImg2ImgPipeline is SDXL's."""
    name = type(pipeline).__name__
    related = [known for known in FAMILIES if name.startswith(known.removesuffix("Pipeline"))]
    return family_named(max(related, key=len) if related else name)


def family_named(pipeline: str) -> "Family":
    """Return the family of a class of pipelines, such as "StableDiffusionXLPipeline"."""
    if pipeline not in FAMILIES:
        raise SboraError(
            f"got a base model of class {pipeline}, which cannot be trained", f"known: {', '.join(FAMILIES)}"
        )
    module, name = FAMILIES[pipeline]
    return getattr(import_module(f"{__name__}.{module}"), name)
