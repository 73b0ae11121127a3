"""Where in a picture its subject is: a file beside the picture, or the picture's own transparency."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sbora_diffusion.errors import SboraError

SUFFIX = ".mask.png"  # dog.jpg has dog.mask.png beside it, or dog.png in the folder masks/ beside images/


def is_mask(path: Path) -> bool:
    """Whether a file is a mask, and not a picture to learn from."""
    return path.name.lower().endswith(SUFFIX)


def load_mask(picture: Path) -> Image.Image | None:
    """An 8-bit grey image of the picture's size, white where the subject is; None if nothing says where.

    Raises:
        SboraError: a mask that is no picture, of another size, or all black.
    """
    folder = picture.parents[1] if picture.parent.name == "images" else picture.parent
    for path in (picture.with_name(picture.stem + SUFFIX), folder / "masks" / f"{picture.stem}.png"):
        if path.is_file():
            return _checked(_read(path).convert("L"), path, picture)
    with _opened(picture) as image:
        if not image.has_transparency_data:
            return None
        alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else _checked(alpha, picture, picture)


def to_mask(mask: Image.Image, size: tuple[int, int], latent_size: tuple[int, int]) -> Tensor:
    """Cut and scaled as a picture is, (1, height, width) float32 of the latents, from 0 to 1.

    Args:
        size: width and height of the picture as the model sees it.
        latent_size: height and width of its latents.
    """
    fitted = ImageOps.fit(mask, size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(fitted)).float()[None, None] / 255
    return torch.nn.functional.adaptive_avg_pool2d(pixels, latent_size)[0]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except OSError as error:
        raise SboraError(f"cannot read {path}: {error}", "export it anew as PNG") from error


def _read(path: Path) -> Image.Image:
    with _opened(path) as image:
        try:
            return ImageOps.exif_transpose(image)
        except OSError as error:
            raise SboraError(f"cannot read the mask {path}: {error}", "export it anew as PNG") from error


def _checked(mask: Image.Image, path: Path, picture: Path) -> Image.Image:
    with _opened(picture) as image:
        size = ImageOps.exif_transpose(image).size
    if mask.size != size:
        raise SboraError(
            f"the mask {path} has {mask.size} pixels, its picture {size}", "scale it to the picture's size"
        )
    if mask.getextrema() == (0, 0):
        raise SboraError(f"the mask {path} is all black: it shows nothing to learn", "paint the subject white")
    return mask
