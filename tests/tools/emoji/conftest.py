"""Art built in code: coloured shapes that stand in for the emoji, which are not in the repository."""

from pathlib import Path

import numpy as np
import pytest

from tools.emoji.art import SIZE, Art, CutOut, save_art

SUBJECTS = [("dog", 0, True), ("owl", 0, False), ("red apple", 0, False), ("turtle", 1, False)]


@pytest.fixture(scope="session")
def art() -> Art:
    """Four subjects in two styles, each an opaque square of its own colour; one of them is a concept."""
    images, cutouts = [], []
    for number, (subject, tier, is_concept) in enumerate(SUBJECTS):
        for style in ("3d", "drawing"):
            image = np.zeros((SIZE, SIZE, 4), np.uint8)
            image[4:-4, 4:-4] = (60 * number, 200 if style == "3d" else 20, 90, 255)
            images.append(image)
            filled = (SIZE - 8) / SIZE
            cutouts.append(CutOut(subject, style, tier, filled, filled, is_concept and style == "3d"))
    return Art(np.stack(images), tuple(cutouts))


@pytest.fixture
def art_folder(art: Art, tmp_path: Path) -> Path:
    """A data folder that holds this art."""
    save_art(art, tmp_path)
    return tmp_path
