"""A comparison's rows, and its table in the published form."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.evaluation.alignment import bootstrap_interval
from sbora_diffusion.evaluation.comparison import Comparison, path_of, trained_as

# of the concepts that ship; one's own count in the mean only
CHARACTERS = frozenset(
    {"cat", "dog", "dragon", "elephant", "horse", "monkey", "octopus", "penguin", "poodle", "rooster", "snail", "tiger"}
)
OBJECTS = frozenset({"beer-mug", "birthday-cake", "christmas-tree", "pumpkin"})
METRICS = {"text_mos": "Text", "image": "Image"}
_HEAD = ["method", "K", "n", *(f"{m} {part}" for m in METRICS.values() for part in ("character", "object", "mean"))]
_HEAD += ["parameters", "file MB", "seconds", "peak MB"]


def summarise(folder: Path, comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each variant and K whose cells are there (all or some: `n` counts them)."""
    rows = []
    for variant in comparison.variants:
        trained = [_read(path_of(folder, "trained", f"{trained_as(variant)}/{seed}/{name}"))
                   for seed in comparison.seeds for name in comparison.concepts]  # fmt: skip
        done = [cell for cell in trained if cell]
        costs = {key: sum(c[key] for c in done) / len(done) for key in done[0]} if done else {}
        for size in comparison.sizes:
            found = read_cells(folder, comparison, variant, size)
            if found:
                rows.append({"variant": variant, "size": size, "n": len(found), **costs, **_scores(found)})
    return rows


def read_cells(folder: Path, comparison: Comparison, variant: str, size: int) -> dict[tuple[str, int], dict[str, Any]]:
    """What is there of a variant at a K: (concept, seed) -> metric -> a number a prompt."""
    cells = {}
    for seed in comparison.seeds:
        for names in comparison.groups(size):
            told = _read(path_of(folder, "scores", f"{variant}/{seed}/{'+'.join(names)}"))
            cells |= {(name, seed): scores for name, scores in told.items()}
    return cells


def _scores(cells: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    kinds = {"character": CHARACTERS, "object": OBJECTS, "mean": {name for name, _ in cells}}
    scores: dict[str, Any] = {metric: {} for metric in METRICS}
    for kind, names in kinds.items():
        chosen = {key: cell for key, cell in cells.items() if key[0] in names}
        for metric in METRICS if chosen else ():
            scores[metric][kind] = estimate(grid({key: cell[metric] for key, cell in chosen.items()}))
    return scores


def grid(cells: Mapping[tuple[str, int], Sequence[float] | Tensor]) -> Tensor:
    """(concept, seed) -> a number a prompt as (prompts, concepts, seeds), NaN where there is no such cell."""
    concepts, seeds = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    columns = [torch.as_tensor(values) for values in cells.values()]
    values = torch.full((len(columns[0]), len(concepts), len(seeds)), torch.nan)
    for (concept, seed), column in zip(cells, columns, strict=True):
        values[:, concepts.index(concept), seeds.index(seed)] = column
    return values


def estimate(values: Tensor) -> dict[str, float]:
    """Of a `grid`: the mean and its bootstrap 95 % interval over prompts, concepts and seeds."""
    low, high = bootstrap_interval(values)
    return {"mean": values.nanmean().item(), "low": low, "high": high}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [_HEAD, ["---"] * len(_HEAD)]
    for row in rows:
        cells = [row["variant"], str(row["size"]), str(row["n"])]
        for metric in METRICS:
            cells += [_told(row[metric].get(kind)) for kind in ("character", "object", "mean")]
        cells += [f"{row['parameters']:,.0f}", f"{row['bytes'] / 1e6:.2f}"]
        lines.append([*cells, f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _told(score: dict[str, float] | None) -> str:
    return "–" if score is None else f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
