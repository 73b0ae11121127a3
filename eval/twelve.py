"""docs/images/twelve.png: 12 concepts of one merge, by method, from the image grids beside the cells of `compare`.

python eval/twelve.py FOLDER/table
"""

import sys
from pathlib import Path

from PIL import Image
from short_tables import SLOW, SUM_SAFE

from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.evaluation.comparison.plan import Comparison, path_of
from sbora_diffusion.inference.image_grid import GAP, LABEL, sheet

ROWS = {
    "LoRA, averaged": "lora",
    "Orthogonal Adaptation": "orthogonal",
    "Custom Diffusion": "custom-diffusion",
    "Mix-of-Show, gradient fusion": "mix-of-show",
    "SBoRA-FA, sum-safe, sum": f"sbora-fa:{SUM_SAFE},merge=sum",
    "SBoRA-FA, sum-safe, fuse": f"sbora-fa:{SUM_SAFE},merge=fuse",
    "SBoRA-FA, fuse": "sbora-fa:merge=fuse",
    "SBoRA-FB, sum-safe, token at 0.03, fuse": f"sbora-fb:{SLOW},merge=fuse",
}
PATH = Path(__file__).parents[1] / "docs" / "images" / "twelve.png"
CELL = 160  # pixels of an image in those grids
PROMPT = 1  # "… on the beach"


def images_of(path: Path, count: int) -> list[tuple[str, Image.Image]]:
    """Return the images of one prompt from a grid, concept by concept."""
    page, left = Image.open(path), GAP + PROMPT * (CELL + GAP)
    tops = [GAP + number * (2 * LABEL + CELL + GAP) + 2 * LABEL for number in range(count)]
    return [("", page.crop((left, top, left + CELL, top + CELL))) for top in tops]


def main(folder: Path) -> None:
    """Write the image."""
    names = Comparison.load(folder).concepts
    concepts = [load_concept(name, default_roots()) for name in names]
    rows = [("reference images (one of five)", [("", load_image(concept.images[1].path)) for concept in concepts])]
    for title, variant in ROWS.items():
        path = path_of(folder, "scores", f"{variant}/0/{'+'.join(names)}").with_suffix(".png")
        rows.append((title, images_of(path, len(names))))
    sheet(rows, cell=104).save(PATH, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
