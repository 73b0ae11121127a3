"""Gating and regions in every family that draws with a U-Net, against what the pipeline itself draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.inference.regions import Region, generate_regions

from .conftest import SAVERS, Life

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)

pytestmark = pytest.mark.parametrize(
    "life", [name for name in SAVERS if name not in ("sd3", "flux")], indirect=True, scope="module"
)


def draw(
    life: Life, prompt: str, regions: Sequence[Region], adapters: Sequence[Adapter], **settings: Any
) -> np.ndarray:
    images = generate_regions(life.base, prompt, regions, adapters, seeds=[0, 1], steps=2, **settings)
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0}, {"negative_prompt": "cat"}])
def test_who_is_not_named_changes_nothing(life: Life, settings: dict[str, Any]) -> None:
    plain = generate(life.base, ["a dog"] * 2, seeds=[0, 1], steps=2, **settings)
    assert np.array_equal(draw(life, "a dog", (), life.adapters, **settings), np.stack(list(map(np.asarray, plain))))


def test_naming_one_gives_the_image_of_that_one_alone(life: Life) -> None:
    rex, tom = life.adapters
    alone = draw(life, "a <rex>", (), [rex])
    assert np.array_equal(draw(life, "a <rex>", (), [tom, rex]), alone)
    assert not np.array_equal(draw(life, "a <rex>", (), [rex], strengths=[0.0]), alone)


def test_each_region_has_its_own(life: Life) -> None:
    """Two side by side are not the image without regions, nor the other way round; their order is nothing."""
    plain = draw(life, "a dog", (), life.adapters)
    named = [Region(box=box, prompt=f"a <{name}>") for box, name in ((LEFT, "rex"), (RIGHT, "tom"))]
    swapped = [Region(box=box, prompt=f"a <{name}>") for box, name in ((RIGHT, "rex"), (LEFT, "tom"))]
    both, other = draw(life, "a dog", named, life.adapters), draw(life, "a dog", swapped, life.adapters)
    assert not np.array_equal(both, plain)
    assert not np.array_equal(both, other)
    assert np.array_equal(draw(life, "a dog", named, life.adapters[::-1]), both)
