"""Caption augmentation: shuffled tags, and whether an image may be mirrored."""

import re

import torch

_SIDES = re.compile(r"\b(left|right)(-hand|wards?|most)?\b", re.IGNORECASE)


def names_a_side(caption: str) -> bool:
    """Return whether mirroring an image would make its caption wrong: "a <dog> on the left"."""
    return _SIDES.search(caption) is not None


def shuffle_tags(caption: str, generator: torch.Generator) -> str:
    """Shuffle the parts between commas except the first: "a <dog>, at night, wet" has two orders."""
    first, *others = [part.strip() for part in caption.split(",") if part.strip()] or [caption]
    order = torch.randperm(len(others), generator=generator).tolist()
    return ", ".join([first, *(others[place] for place in order)])
