"""Shapes of images that keep their proportions: about as many pixels as the model's own square each."""

STRETCH = 2.0  # how many times wider than high, or higher than wide, at the most
STEPS = 8  # a side is a multiple of this part of the square's


def bucket_of(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Width and height, nearest to an image's proportions, of about resolution² pixels.

    Sides are multiples of an eighth of the resolution: 64 pixels for Stable Diffusion 1.5, 128 for SDXL, as the models'
    U-Nets like them.
    """
    step = max(1, resolution // STEPS)
    aspect = min(STRETCH, max(1 / STRETCH, width / height))
    wide, high = resolution * aspect**0.5, resolution / aspect**0.5
    return max(step, round(wide / step) * step), max(step, round(high / step) * step)
