"""Load images and masks of any origin and convert them to tensors to train on."""

import io
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from sbora_diffusion.data.folder import mask_file
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP")
MIN_SIDE = 32  # pixels; less shows nothing that could be learned
PROFILED = {"L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}  # mode -> what a profile speaks of


def load_image(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Read a JPEG, PNG or WebP file as upright sRGB, 8 bits a channel; the first frame if it is animated.

    Colours follow the embedded ICC profile; 16-bit grey and palettes are taken for sRGB. The extension is ignored.

    Args:
        background: sRGB colour that shows through transparent parts.

    Raises:
        SboraError: the file is missing, no image of these formats, damaged, or unreasonably small or large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                image = _to_srgb(ImageOps.exif_transpose(file), path)
                image = _flatten(_eight_bits(image), background)
    except FileNotFoundError as error:
        raise SboraError(f"no such image: {path}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SboraError(f"{path} is too large: at most 89 megapixels are read", "scale it down") from error
    except Exception as error:  # decoders of damaged files raise all kinds: OSError, SyntaxError, struct.error, …
        raise SboraError(f"cannot read {path}: {_reason(error)}", "export it anew as JPEG, PNG or WebP") from error
    if min(image.size) < MIN_SIDE:
        width, height = image.size
        raise SboraError(f"{path} is too small: {width} x {height} pixels, at least {MIN_SIDE} x {MIN_SIDE} are needed")
    return image


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Crop the largest central part of these proportions of an RGB image and resize it (Lanczos).

    Args:
        size: width and height.

    Returns:
        (3, height, width) float32 in [-1, 1].
    """
    fitted = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    """Apply the image's ICC profile; return the image itself without a valid one."""
    profile, mode = image.info.get("icc_profile"), PROFILED.get(image.mode)
    if not profile or mode is None:
        return image
    try:
        transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
    except ImageCms.PyCMSError as error:
        log.warning("%s: its colour profile does not work (%s), its colours are taken for sRGB", path, error)
        return image
    converted = transform.apply(image.convert(mode))
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which Pillow's own conversion would clip; return other modes as they are."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert any 8-bit mode to RGB, transparent parts filled with the background colour."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    backdrop = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(backdrop, image.convert("RGBA")).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "neither JPEG, PNG nor WebP"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


_SIDES = re.compile(r"\b(left|right)(-hand|wards?|most)?\b", re.IGNORECASE)


def names_a_side(caption: str) -> bool:
    """Return whether mirroring an image would make its caption wrong: "a <dog> on the left"."""
    return _SIDES.search(caption) is not None


def shuffle_tags(caption: str, generator: torch.Generator) -> str:
    """Shuffle the parts between commas except the first: "a <dog>, at night, wet" has two orders."""
    first, *others = [part.strip() for part in caption.split(",") if part.strip()] or [caption]
    order = torch.randperm(len(others), generator=generator).tolist()
    return ", ".join([first, *(others[place] for place in order)])


STRETCH = 2.0  # the largest aspect ratio
STEPS = 8  # a side is a multiple of resolution / STEPS


def bucket_of(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Return the width and height of about resolution² pixels nearest to an image's aspect ratio.

    Sides are multiples of an eighth of the resolution: 64 pixels for Stable Diffusion 1.5, 128 for SDXL, which
    divides evenly in the models' U-Nets.
    """
    step = max(1, resolution // STEPS)
    aspect = min(STRETCH, max(1 / STRETCH, width / height))
    wide, high = resolution * aspect**0.5, resolution / aspect**0.5
    return max(step, round(wide / step) * step), max(step, round(high / step) * step)


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
