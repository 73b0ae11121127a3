"""A comparison's results, read from its cells: a main table and paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.evaluation.comparison.plan import Comparison, path_of, trained_as
from sbora_diffusion.evaluation.judges import metrics_of
from sbora_diffusion.evaluation.metrics import Estimate, format_estimate
from sbora_diffusion.utils.files import read_json

# of the concepts that come with the package; other concepts count in the mean only
CHARACTERS = frozenset(
    {"cat", "dog", "dragon", "elephant", "horse", "monkey", "octopus", "penguin", "poodle", "rooster", "snail", "tiger"}
)
OBJECTS = frozenset({"beer-mug", "birthday-cake", "christmas-tree", "pumpkin"})
KINDS = ("character", "object", "mean")
Cells = dict[tuple[str, int], dict[str, Any]]  # (concept, seed) -> metric -> one score for each prompt
Rows = list[dict[str, Any]]


def compared_metrics(comparison: Comparison) -> dict[str, str]:
    """Return the metrics whose differences are taken, and their titles."""
    return {key: metric.compared_as for key, metric in metrics_of(comparison.judge).items() if metric.compared_as}


def summarise(folder: Path, comparison: Comparison) -> Rows:
    """Return a row for each variant and K that has at least one cell, with `n`, the number of its cells."""
    in_table = [key for key, metric in metrics_of(comparison.judge).items() if metric.in_table]
    rows = []
    for variant in comparison.variants:
        costs = _mean_costs(folder, comparison, variant)
        for size in comparison.sizes:
            if found := read_cells(folder, comparison, variant, size):
                scores = _scores(found, in_table)
                rows.append({"variant": variant, "size": size, "n": len(found), **costs, **scores})
    return rows


def differences(folder: Path, comparison: Comparison) -> Rows:
    """Return a row for each other variant and K: its scores minus the first variant's at the same K.

    Taken over the `n` pairs (concept, seed) that both have, with intervals over prompts, concepts and seeds. How much
    concepts differ from each other, which widens the intervals of both means, cancels out.
    """
    first, *others = comparison.variants
    jobs = [((variant, size), (first, size), first) for variant in others for size in comparison.sizes]
    return _paired_rows(folder, comparison, jobs)


def changes(folder: Path, comparison: Comparison) -> Rows:
    """Return a row for each variant and K above 1: scores in a merge of K minus those of the single concepts.

    Taken like `differences`, over the (concept, seed) that were scored in both ways.
    """
    sizes = sorted(set(comparison.sizes) - {1})
    jobs = [((variant, size), (variant, 1), "single concepts") for variant in comparison.variants for size in sizes]
    return _paired_rows(folder, comparison, jobs)


def table(rows: Rows, metrics: Mapping[str, str]) -> str:
    """Return the rows in Markdown, each metric's mean over characters, objects and all concepts."""
    head = ["method", "K", "n", *(f"{title} {kind}" for title in metrics.values() for kind in KINDS)]
    lines = []
    for row in rows:
        cells = [row["variant"], str(row["size"]), str(row["n"])]
        cells += [format_estimate(row[m][kind]) if kind in row[m] else "–" for m in metrics for kind in KINDS]
        cells += [f"{row['parameters']:,.0f}", f"{row['bytes'] / 1e6:.2f}"]
        lines.append([*cells, f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"])
    return markdown([*head, "parameters", "file MB", "seconds", "peak MB"], lines)


def differences_table(rows: Rows, metrics: Mapping[str, str]) -> str:
    """Return the rows in Markdown; a difference whose interval does not contain 0 is bold."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        cells = [_bold_if_significant(row[metric]) if metric in row else "–" for metric in metrics]
        lines.append([row["variant"], str(row["size"]), str(row["n"]), *cells])
    return markdown([f"minus {rows[0]['minus']}", "K", "n", *metrics.values()], lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, without padding."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]) + "\n"


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


def _paired_rows(
    folder: Path, comparison: Comparison, jobs: Sequence[tuple[tuple[str, int], tuple[str, int], str]]
) -> Rows:
    """Return a row for each pair of (variant, K) that share cells: estimates of the first minus the second."""
    rows = []
    for (variant, size), other, minus in jobs:
        ours, theirs = (read_cells(folder, comparison, *which) for which in ((variant, size), other))
        shared = [key for key in ours if key in theirs]
        row: dict[str, Any] = {"variant": variant, "minus": minus, "size": size, "n": len(shared)}
        for metric in compared_metrics(comparison) if shared else ():
            both = {key: (ours[key].get(metric), theirs[key].get(metric)) for key in shared}
            if all(None not in pair for pair in both.values()):
                gains = {key: torch.tensor(our) - torch.tensor(their) for key, (our, their) in both.items()}
                row[metric] = vars(Estimate.of(grid(gains)))
        rows += [row] if shared else []
    return rows


def _bold_if_significant(difference: Mapping[str, float]) -> str:
    text = format_estimate(difference, "+")
    return f"**{text}**" if difference["low"] > 0 or difference["high"] < 0 else text


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
