"""Subject masks: a file beside the image, or the image's own alpha channel."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sbora_diffusion.data.images import load_image
from sbora_diffusion.utils.errors import SboraError

SUFFIX = ".mask.png"  # dog.jpg has dog.mask.png beside it, or dog.png in the folder masks/ beside images/


def is_mask(path: Path) -> bool:
    """Return whether a file is a mask and not an image to learn from."""
    return path.name.lower().endswith(SUFFIX)


def mask_file(image: Path) -> Path | None:
    """Return the mask beside an image, or None."""
    folder = image.parents[1] if image.parent.name == "images" else image.parent
    beside = (image.with_name(image.stem + SUFFIX), folder / "masks" / f"{image.stem}.png")
    return next((path for path in beside if path.is_file()), None)


def load_mask(image: Path) -> Image.Image | None:
    """Return an 8-bit grey image of the image's size, white on the subject; None if the image has no mask.

    Raises:
        SboraError: an unreadable image or mask, a mask of another size or without any white.
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
    """Scale a mask as its image is scaled, to (1, height, width) float32 of the latents, from 0 to 1.

    Args:
        size: width and height of the image after scaling.
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
