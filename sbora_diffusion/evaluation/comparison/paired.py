"""Paired differences, concept by concept: they are more precise than the difference of two means' intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.evaluation.comparison.plan import Comparison
from sbora_diffusion.evaluation.comparison.table import Cells, grid, markdown, read_cells
from sbora_diffusion.evaluation.judges.registry import metrics_of
from sbora_diffusion.evaluation.metrics.bootstrap import Estimate, format_estimate


def compared_metrics(comparison: Comparison) -> dict[str, str]:
    """Return the metrics whose differences are taken, and their titles."""
    return {key: metric.compared_as for key, metric in metrics_of(comparison.judge).items() if metric.compared_as}


def differences(folder: Path, comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each other variant and K: its scores minus the first variant's at the same K.

    Taken over the `n` pairs (concept, seed) that both have, with intervals over prompts, concepts and seeds. How much
    concepts differ from each other, which widens the intervals of both means, cancels out.
    """
    first, *others = comparison.variants
    rows = []
    for variant in others:
        for size in comparison.sizes:
            ours, theirs = (read_cells(folder, comparison, which, size) for which in (variant, first))
            found = _paired(ours, theirs, compared_metrics(comparison))
            if found:
                rows.append({"variant": variant, "minus": first, "size": size, **found})
    return rows


def changes(folder: Path, comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each variant and K above 1: scores in a merge of K minus those of the single concepts.

    Taken like `differences`, over the (concept, seed) that were scored in both ways.
    """
    rows = []
    for variant in comparison.variants:
        single = read_cells(folder, comparison, variant, 1)
        for size in sorted(set(comparison.sizes) - {1}):
            merged = read_cells(folder, comparison, variant, size)
            found = _paired(merged, single, compared_metrics(comparison))
            if found:
                rows.append({"variant": variant, "minus": "single concepts", "size": size, **found})
    return rows


def differences_table(rows: list[dict[str, Any]], metrics: Mapping[str, str]) -> str:
    """Return the rows in Markdown; a difference whose interval does not contain 0 is bold."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        cells = [_bold_if_significant(row[metric]) if metric in row else "–" for metric in metrics]
        lines.append([row["variant"], str(row["size"]), str(row["n"]), *cells])
    return markdown([f"minus {rows[0]['minus']}", "K", "n", *metrics.values()], lines)


def _paired(ours: Cells, theirs: Cells, metrics: Mapping[str, str]) -> dict[str, Any]:
    """Return the number of shared cells, and the estimate of each metric's difference; empty if none is shared."""
    shared = [key for key in ours if key in theirs]
    found: dict[str, Any] = {"n": len(shared)} if shared else {}
    for metric in metrics if shared else ():
        both = {key: (ours[key].get(metric), theirs[key].get(metric)) for key in shared}
        if all(None not in pair for pair in both.values()):
            gains = {key: torch.tensor(our) - torch.tensor(their) for key, (our, their) in both.items()}
            found[metric] = vars(Estimate.of(grid(gains)))
    return found


def _bold_if_significant(difference: Mapping[str, float]) -> str:
    text = format_estimate(difference, "+")
    return f"**{text}**" if difference["low"] > 0 or difference["high"] < 0 else text
