"""Sheets: every image is there, in its place, at the right size."""

import numpy as np
from PIL import Image

from sbora_diffusion.inference.image_grid import GAP, LABEL, sheet


def test_images_stand_in_rows_and_columns() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("L", (500, 400), 255)
    page = np.asarray(
        sheet([("first", [("a", red), ("b", red)]), ("second", [("a very long label " * 9, blue)])], cell=64)
    )
    row_height = 2 * LABEL + 64 + GAP
    assert page.shape == (GAP + 2 * row_height, GAP + 2 * (64 + GAP), 3)
    top, left = GAP + 2 * LABEL, GAP
    for column in range(2):
        cell = page[top : top + 64, left + column * (64 + GAP) :][:, :64]
        assert (cell == (255, 0, 0)).all()
    assert (page[: GAP + LABEL] < 200).any()  # the title is written
