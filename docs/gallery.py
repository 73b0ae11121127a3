"""Generate docs/images: trained concepts, and three of them merged by fuse, from the concept files in ./adapters."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.methods.merging import merge
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.utils.text import with_article

PLACES = {  # in the prompt, and above the image
    "on the beach": "on the beach",
    "in the snow": "in the snow",
    "at night": "at night",
    "and a red apple on the grass": "with an apple",
}


def images(base: Base, subject: str, seeds: Sequence[int]) -> list[tuple[str, Image.Image]]:
    """Generate a labelled image of a subject in each of PLACES, for each seed."""
    prompts = [f"{with_article(subject)} {place}" for place in PLACES for _ in seeds]
    labels = [label for label in PLACES.values() for _ in seeds]
    return list(zip(labels, generate(base, prompts, seeds=[*seeds] * len(PLACES)), strict=True))


def given(name: str) -> list[tuple[str, Image.Image]]:
    """Return an image that the concept was trained on."""
    return [("given", load_image(load_concept(name, default_roots()).images[1].path))]


def rows_of(base: Base, adapters: Sequence[Adapter], loaded: str, seeds: Sequence[int]) -> list:
    """Return one row per concept, generated with what is applied now."""
    rows = []
    for adapter in adapters:
        (token,) = adapter.spec.tokens
        rows.append((f"{token}, {loaded}", given(adapter.spec.name) + images(base, token, seeds)))
    return rows


def main() -> None:
    """Generate images of single concepts (concepts.png; its first seed is readme.png) and of a merge (merged.png)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="+", help="concepts in ./adapters")
    parser.add_argument("--merged", type=int, default=3, help="how many of them to merge")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    base = load_base("emoji64")
    adapters = [Adapter.load(f"adapters/{name}.safetensors") for name in args.names]
    single_rows = []
    for adapter in adapters:
        with applied(base, [adapter]):
            single_rows += rows_of(base, [adapter], "single", args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    sheet(single_rows, cell=96).save(args.out / "concepts.png", optimize=True)
    first = [(title, shown[:1] + shown[1 :: len(args.seeds)]) for title, shown in single_rows]
    sheet(first, cell=96).save(args.out / "readme.png", optimize=True)

    chosen = adapters[: args.merged]
    nouns = [noun for adapter in chosen for noun in adapter.spec.tokens.values()]
    before = {noun: images(base, noun, args.seeds) for noun in nouns}
    with applied(base, [merge(chosen, base=base)]):
        rows = rows_of(base, chosen, f"{len(chosen)} concepts merged", args.seeds)
        for noun in nouns:
            rows.append((f"{noun}, without token: the base model", given(noun) + before[noun]))
            rows.append((f"{noun}, without token: after the merge", given(noun) + images(base, noun, args.seeds)))
    sheet(rows, cell=96).save(args.out / "merged.png", optimize=True)


if __name__ == "__main__":
    main()
