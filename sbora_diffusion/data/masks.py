"""Where in an image its subject is: a file beside the image, or the image's own transparency."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sbora_diffusion.data.images import load_image
from sbora_diffusion.utils.errors import SboraError

SUFFIX = ".mask.png"  # dog.jpg has dog.mask.png beside it, or dog.png in the folder masks/ beside images/


def is_mask(path: Path) -> bool:
    """Whether a file is a mask, and not an image to learn from."""
    return path.name.lower().endswith(SUFFIX)


def mask_file(image: Path) -> Path | None:
    """The mask beside an image, if there is one."""
    folder = image.parents[1] if image.parent.name == "images" else image.parent
    beside = (image.with_name(image.stem + SUFFIX), folder / "masks" / f"{image.stem}.png")
    return next((path for path in beside if path.is_file()), None)


def load_mask(image: Path) -> Image.Image | None:
    """An 8-bit grey image of the image's size, white where the subject is; None if nothing says where.

    Raises:
        SboraError: what `load_image` raises of the image and of its mask, a mask of another size, or all black.
    """
    size = load_image(image).size
    if path := mask_file(image):
        return _checked(load_image(path, background=(0, 0, 0)).convert("L"), path, size)
    with Image.open(image) as opened:
        if not opened.has_transparency_data:
            return None
        alpha = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else _checked(alpha, image, size)


def to_mask(mask: Image.Image, size: tuple[int, int], latent_size: tuple[int, int]) -> Tensor:
    """Cut and scaled as an image is, (1, height, width) float32 of the latents, from 0 to 1.

    Args:
        size: width and height of the image as the model sees it.
        latent_size: height and width of its latents.
    """
    fitted = ImageOps.fit(mask, size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(fitted)).float()[None, None] / 255
    return torch.nn.functional.adaptive_avg_pool2d(pixels, latent_size)[0]


def _checked(mask: Image.Image, path: Path, size: tuple[int, int]) -> Image.Image:
    if mask.size != size:
        raise SboraError(f"the mask {path} has {mask.size} pixels, its image {size}", "scale it to the image's size")
    if mask.getextrema() == (0, 0):
        raise SboraError(f"the mask {path} is all black: it shows nothing to learn", "paint the subject white")
    return mask
