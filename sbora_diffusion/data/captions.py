"""What may be done with a caption while a training goes on."""

import re

import torch

_SIDES = re.compile(r"\b(left|right)(-hand|wards?|most)?\b", re.IGNORECASE)


def names_a_side(caption: str) -> bool:
    """Whether a mirrored image would belie the caption: "a <dog> on the left"."""
    return _SIDES.search(caption) is not None


def shuffle_tags(caption: str, generator: torch.Generator) -> str:
    """The parts between commas in another order, the first one in its place: "a <dog>, at night, wet" has two."""
    first, *others = [part.strip() for part in caption.split(",") if part.strip()] or [caption]
    order = torch.randperm(len(others), generator=generator).tolist()
    return ", ".join([first, *(others[place] for place in order)])
