"""How much two concepts bleed into each other in one image: summed, fused, gated, with and without regions.

    python eval/bleed.py FOLDER [--adapters DIR] [--concepts dog,…] [--seeds 0,1]

Every pair is a file in FOLDER that is computed once, with a grid of its images; the command can be killed and run
again. --out is the summary as JSON, with a Markdown table and a grid of one image of each pair beside it.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import torch
import typer
from inputs import CachedInputs
from PIL import Image
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.fuse import fuse
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.evaluation.comparison.tables import markdown
from sbora_diffusion.evaluation.images import reference_images
from sbora_diffusion.evaluation.judges import clip
from sbora_diffusion.evaluation.metrics import Estimate, class_rank, format_estimate
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_grid import GAP, LABEL, sheet
from sbora_diffusion.inference.regions import Region, generate_regions
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.training.checkpoint import versions
from sbora_diffusion.utils.files import write_file
from tools.emoji.measure import HALVES

log = logging.getLogger("bleed")

PLACES = ("on the grass", "in the snow")
CELL = 96  # pixels of an image's side in grids
BOXES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
CONDITIONS = (
    "base model, class nouns",
    "sum",
    "fuse",
    "gated",
    "sum, regions",
    "fuse, regions",
    "gated, regions",
    "gated, regions of one subject",
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The concepts on the left and on the right, and the place."""

    names: tuple[str, str]
    nouns: tuple[str, str]
    place: str

    def prompt(self, *shown_as_concept: int) -> str:
        """Return a prompt with the tokens of the given concepts (0, 1) and the class nouns of the others."""
        words = [f"<{name}>" if side in shown_as_concept else self.nouns[side] for side, name in enumerate(self.names)]
        return f"a {words[0]} and a {words[1]} {self.place}"

    def regions(self, one_subject: bool = False) -> tuple[Region, ...]:
        """Return a half for each; its prompt names its concept and, unless `one_subject`, the other's class noun."""
        tokens = [f"<{name}>" for name in self.names]
        prompts = [f"a {token} {self.place}" if one_subject else self.prompt(n) for n, token in enumerate(tokens)]
        return tuple(Region(box=box, prompt=prompt) for box, prompt in zip(BOXES, prompts, strict=True))


class Studio:
    """The base model, the concepts and the judge."""

    def __init__(
        self,
        base: Base,
        judge: clip.AlignmentScorer,
        adapters: Mapping[str, Adapter],
        seeds: Sequence[int],
        steps: int | None = None,
    ) -> None:
        self._base, self.judge, self._adapters, self._seeds, self._steps = base, judge, adapters, seeds, steps
        self._inputs = CachedInputs(base, list(adapters.values()))

    def images(self, pair: tuple[str, str]) -> Iterator[tuple[str, list[tuple[Scene, list[Image.Image]]]]]:
        """Yield for each condition every scene of the pair and its images, one for each seed."""
        live = [self._adapters[name] for name in pair]
        written = {"sum": merge(live, [1.0, 1.0], "sum"), "fuse": fuse(live, [1.0, 1.0], self._inputs)}
        for condition in CONDITIONS:
            how, _, where = condition.partition(", ")
            adapters = live if how == "gated" else []
            with applied(self._base, [written[how]]) if how in written else nullcontext():
                yield condition, [(scene, self._generate(scene, how, where, adapters)) for scene in self._scenes(pair)]

    def _scenes(self, pair: tuple[str, str]) -> list[Scene]:
        nouns = {name: next(iter(self._adapters[name].spec.tokens.values())) for name in pair}
        return [
            Scene(names=names, nouns=(nouns[names[0]], nouns[names[1]]), place=place)
            for place in PLACES
            for names in (pair, (pair[1], pair[0]))
        ]

    def _generate(self, scene: Scene, how: str, where: str, adapters: Sequence[Adapter]) -> list[Image.Image]:
        prompt = scene.prompt() if where or how == "base model" else scene.prompt(0, 1)
        if how == "base model" or not (where or adapters):
            return generate(self._base, [prompt] * len(self._seeds), seeds=self._seeds, steps=self._steps)
        regions = scene.regions(one_subject=where == "regions of one subject") if where else ()
        return generate_regions(self._base, prompt, regions, adapters, seeds=self._seeds, steps=self._steps)


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return all pairs, neighbours first, so that a study that is stopped early includes every concept."""
    numbers = sorted(combinations(range(len(names)), 2), key=lambda pair: (pair[1] - pair[0], pair))
    return [(names[one], names[other]) for one, other in numbers]


def measure(studio: Studio, pair: tuple[str, str], folder: Path) -> None:
    """Generate and score a pair: for each condition scores (scenes, seeds, halves, concepts) and the scenes' names."""
    found, rows = {}, []
    for condition, generated in studio.images(pair):
        scores = [[_score(studio.judge, image).tolist() for image in images] for _, images in generated]
        found[condition] = {"names": [scene.names for scene, _ in generated], "scores": scores}
        rows.append((condition, [(" | ".join(scene.names), image) for scene, some in generated for image in some]))
    folder.mkdir(parents=True, exist_ok=True)
    sheet(rows, cell=CELL).save(folder / f"{'+'.join(pair)}.png")
    write_file(folder / f"{'+'.join(pair)}.json", json.dumps(found).encode(), overwrite=True)


def _score(judge: clip.AlignmentScorer, image: Image.Image) -> Tensor:
    """Return (2 halves, concepts): the image alignment of each half with every concept, in the judge's order."""
    scale = image.width / 64  # HALVES are for emoji64's images
    boxes = [(left * scale, top * scale, right * scale, bottom * scale) for left, top, right, bottom in HALVES]
    halves = [image.resize(image.size, Image.Resampling.BICUBIC, box) for box in boxes]
    return class_rank(judge.encoder.images(halves), list(judge.references.values()))


def summarise(folder: Path, names: Sequence[str], number: int) -> dict:
    """Return the figures of every condition, over all computed pairs."""
    pairs = [path for path in (folder / f"{'+'.join(pair)}.json" for pair in pairs_of(names)) if path.exists()]
    cells = [json.loads(path.read_bytes()) for path in pairs]
    rows: list[dict] = []
    values = {condition: _over_all(cells, condition, names) for condition in CONDITIONS} if cells else {}
    for condition, own in values.items():
        against_sum = own["both first"] - values["sum"]["both first"]  # of the same scenes and seeds
        figures = own | {"both first, against sum": against_sum}
        rows.append({"condition": condition, **{key: Estimate.of(value).rounded(4) for key, value in figures.items()}})
    return {
        "command": "python " + " ".join(sys.argv),
        "concepts": list(names),
        "pairs": len(cells),
        "images a condition": number * len(cells) * 2 * len(PLACES),
        "versions": versions(),
        "rows": rows,
    }


def _over_all(cells: Sequence[Mapping], condition: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Return (pairs · scenes, seeds) of each figure."""
    figures = [_figures(cell[condition], names) for cell in cells]
    return {key: torch.cat([figure[key] for figure in figures]) for key in figures[0]}


def _figures(cell: Mapping, names: Sequence[str]) -> dict[str, Tensor]:
    """Return (scenes, seeds) of each figure, with the assignment of concepts to halves that fits the image better.

    Only `as asked` depends on the places: whether that assignment is the one of the prompt or the regions.
    """
    scores = torch.tensor(cell["scores"])  # (scenes, seeds, 2, concepts)
    who = torch.tensor([[names.index(name) for name in pair] for pair in cell["names"]])[:, None]  # (scenes, 1, 2)
    who = who.expand(*scores.shape[:2], 2)
    swapped = _gather(scores, who).sum(-1) < _gather(scores, who.flip(-1)).sum(-1)
    own_index = torch.where(swapped[..., None], who.flip(-1), who)
    own, other = _gather(scores, own_index), _gather(scores, own_index.flip(-1))
    rank = 1 + (scores > own[..., None]).sum(-1)
    return {
        "both first": (rank == 1).all(-1).float(),
        "first": (rank == 1).float().mean(-1),
        "rank": rank.float().mean(-1),
        "own": own.mean(-1),
        "other": other.mean(-1),
        "as asked": (~swapped).float(),
    }


def _gather(scores: Tensor, index: Tensor) -> Tensor:
    return scores.gather(-1, index[..., None]).squeeze(-1)


def table(summary: Mapping) -> str:
    """Return the summary's rows in Markdown."""
    keys = ("both first", "both first, against sum", "first", "rank", "own", "other", "as asked")
    rows = [[row["condition"], *(format_estimate(row[key]) for key in keys)] for row in summary["rows"]]
    return markdown(["", *keys], rows)


def run(folder: Path, names: Sequence[str], number: int, open_studio: Callable[[], Studio], out: Path) -> None:
    """Compute every missing pair, and write the summary after each."""
    studio: Studio | None = None
    for pair in pairs_of(names):
        if (folder / f"{'+'.join(pair)}.json").exists():
            continue
        studio = studio or open_studio()
        log.info("%s and %s", *pair)
        measure(studio, pair, folder)
        write_summary(summarise(folder, names, number), out)
    write_summary(summarise(folder, names, number), out)
    overview(folder, names).save(out.with_suffix(".png"))


def overview(folder: Path, names: Sequence[str]) -> Image.Image:
    """Return a grid of the first image of each pair, a row for each condition."""
    paths = [path for path in (folder / f"{'+'.join(pair)}.png" for pair in pairs_of(names)) if path.exists()]
    columns = [(path.stem.replace("+", " | "), _first_images(path)) for path in paths]
    return sheet([(name, [(pair, some[row]) for pair, some in columns]) for row, name in enumerate(CONDITIONS)], CELL)


def _first_images(path: Path) -> list[Image.Image]:
    """Return the first image of each row of a pair's grid."""
    with Image.open(path) as page:
        tops = [GAP + row * (2 * LABEL + CELL + GAP) + 2 * LABEL for row in range(len(CONDITIONS))]
        return [page.crop((GAP, top, GAP + CELL, top + CELL)) for top in tops]


def write_summary(summary: Mapping, out: Path) -> None:
    write_file(out, (json.dumps(summary, indent=1) + "\n").encode(), overwrite=True)
    write_file(out.with_suffix(".md"), table(summary).encode(), overwrite=True)


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of all pairs.")],
    adapters: Annotated[Path, typer.Option(metavar="DIR", help="The trained concepts.")] = Path("adapters"),
    concepts: Annotated[str, typer.Option(metavar="NAME,…")] = "dog,penguin,octopus,cat,horse,rooster",
    seeds: Annotated[str, typer.Option(metavar="N,…")] = "0,1",
    out: Annotated[Path, typer.Option(metavar="FILE", help="The summary.")] = Path("eval/results/bleed.json"),
) -> None:
    """Measure identity bleed between pairs of concepts on emoji64."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    names, numbers = concepts.split(","), [int(seed) for seed in seeds.split(",")]

    def open_studio() -> Studio:
        loaded = {name: Adapter.load(adapters / f"{name}.safetensors") for name in names}
        known = [load_concept(name, default_roots()) for name in names]
        judge = clip.load("emoji-clip").prepare(reference_images(known))
        return Studio(load_base("emoji64"), judge, loaded, numbers)

    run(folder, names, len(numbers), open_studio, out)


if __name__ == "__main__":
    typer.run(main)
