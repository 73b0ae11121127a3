"""Aspect-ratio buckets: image shapes with about as many pixels as the model's own square."""

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
