"""Paired differences in a comparison, concept by concept: intervals of means cannot tell what these can."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.evaluation.compare_table import METRICS, estimate, grid, read_cells
from sbora_diffusion.evaluation.comparison import Comparison

COMPARED = METRICS | {"success": "Success"}
_Cells = Mapping[tuple[str, int], Mapping[str, Any]]


def differences(folder: Path, comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each other variant and K: the mean of its scores minus the first variant's at the same K.

    Taken over the (concept, seed) that both have, `n`; each with the interval of `bootstrap_interval` over prompts,
    concepts and seeds. How much concepts differ, which widens the intervals of both means, is not in it.
    """
    first, *others = comparison.variants
    rows = []
    for variant in others:
        for size in comparison.sizes:
            found = _paired(*(read_cells(folder, comparison, which, size) for which in (variant, first)))
            if found:
                rows.append({"variant": variant, "minus": first, "size": size, **found})
    return rows


def changes(folder: Path, comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each variant and K above 1: what a merge of K changes, its scores minus the same concepts' alone.

    As `differences` are taken: over the (concept, seed) that were judged in both ways.
    """
    rows = []
    for variant in comparison.variants:
        alone = read_cells(folder, comparison, variant, 1)
        for size in sorted(set(comparison.sizes) - {1}):
            found = _paired(read_cells(folder, comparison, variant, size), alone)
            if found:
                rows.append({"variant": variant, "minus": "alone", "size": size, **found})
    return rows


def _paired(ours: _Cells, theirs: _Cells) -> dict[str, Any]:
    """Of what both have: how many, and the estimate of each metric's difference. Nothing where they share nothing."""
    shared = [key for key in ours if key in theirs]
    found: dict[str, Any] = {"n": len(shared)} if shared else {}
    for metric in COMPARED if shared else ():
        both = {key: (ours[key].get(metric), theirs[key].get(metric)) for key in shared}
        if all(None not in pair for pair in both.values()):
            changes = {key: torch.tensor(our) - torch.tensor(their) for key, (our, their) in both.items()}
            found[metric] = estimate(grid(changes))
    return found


def differences_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a difference whose interval leaves out 0 is bold."""
    if not rows:
        return ""
    head = [f"minus {rows[0]['minus']}", "K", "n", *COMPARED.values()]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        told = [_told(row[metric]) if metric in row else "–" for metric in COMPARED]
        lines.append([row["variant"], str(row["size"]), str(row["n"]), *told])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _told(difference: dict[str, float]) -> str:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    text = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
