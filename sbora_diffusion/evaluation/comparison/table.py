"""A comparison's scores, read from its cells, and its main table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.evaluation.comparison.plan import Comparison, path_of, trained_as
from sbora_diffusion.evaluation.judges.registry import metrics_of
from sbora_diffusion.evaluation.metrics.bootstrap import Estimate, format_estimate

# of the concepts that come with the package; other concepts count in the mean only
CHARACTERS = frozenset(
    {"cat", "dog", "dragon", "elephant", "horse", "monkey", "octopus", "penguin", "poodle", "rooster", "snail", "tiger"}
)
OBJECTS = frozenset({"beer-mug", "birthday-cake", "christmas-tree", "pumpkin"})
KINDS = ("character", "object", "mean")
Cells = dict[tuple[str, int], dict[str, Any]]  # (concept, seed) -> metric -> one score for each prompt


def table_metrics(comparison: Comparison) -> dict[str, str]:
    """Return the metrics of the main table, and their titles there."""
    return {key: metric.compared_as for key, metric in metrics_of(comparison.judge).items() if metric.in_table}


def summarise(folder: Path, comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each variant and K that has at least one cell, with `n`, the number of its cells."""
    rows = []
    for variant in comparison.variants:
        costs = _mean_costs(folder, comparison, variant)
        for size in comparison.sizes:
            found = read_cells(folder, comparison, variant, size)
            if found:
                scores = _scores(found, list(table_metrics(comparison)))
                rows.append({"variant": variant, "size": size, "n": len(found), **costs, **scores})
    return rows


def read_cells(folder: Path, comparison: Comparison, variant: str, size: int) -> Cells:
    """Read the existing cells of a variant at a K."""
    cells = {}
    for seed in comparison.seeds:
        for names in comparison.groups(size):
            found = _read(path_of(folder, "scores", f"{variant}/{seed}/{'+'.join(names)}"))
            cells |= {(name, seed): scores for name, scores in found.items()}
    return cells


def grid(cells: Mapping[tuple[str, int], Sequence[float] | Tensor]) -> Tensor:
    """Return scores by (concept, seed) as (prompts, concepts, seeds), NaN where there is no such cell."""
    concepts, seeds = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    columns = [torch.as_tensor(values) for values in cells.values()]
    values = torch.full((len(columns[0]), len(concepts), len(seeds)), torch.nan)
    for (concept, seed), column in zip(cells, columns, strict=True):
        values[:, concepts.index(concept), seeds.index(seed)] = column
    return values


def table(rows: list[dict[str, Any]], metrics: Mapping[str, str]) -> str:
    """Return the rows in Markdown, each metric's mean over characters, objects and all concepts."""
    head = ["method", "K", "n", *(f"{title} {kind}" for title in metrics.values() for kind in KINDS)]
    lines = []
    for row in rows:
        cells = [row["variant"], str(row["size"]), str(row["n"])]
        cells += [format_estimate(row[m][kind]) if kind in row[m] else "–" for m in metrics for kind in KINDS]
        cells += [f"{row['parameters']:,.0f}", f"{row['bytes'] / 1e6:.2f}"]
        lines.append([*cells, f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"])
    return markdown([*head, "parameters", "file MB", "seconds", "peak MB"], lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, without padding."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def _mean_costs(folder: Path, comparison: Comparison, variant: str) -> dict[str, float]:
    keys = [f"{trained_as(variant)}/{seed}/{name}" for seed in comparison.seeds for name in comparison.concepts]
    done = [cell for cell in (_read(path_of(folder, "trained", key)) for key in keys) if cell]
    return {key: sum(cell[key] for cell in done) / len(done) for key in done[0]} if done else {}


def _scores(cells: Cells, metrics: Sequence[str]) -> dict[str, Any]:
    kinds = {"character": CHARACTERS, "object": OBJECTS, "mean": {name for name, _ in cells}}
    scores: dict[str, Any] = {metric: {} for metric in metrics}
    for kind, names in kinds.items():
        chosen = {key: cell for key, cell in cells.items() if key[0] in names}
        for metric in metrics if chosen else ():
            scores[metric][kind] = vars(Estimate.of(grid({key: cell[metric] for key, cell in chosen.items()})))
    return scores


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
