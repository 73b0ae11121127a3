"""How the variants of a comparison differ from its first one, concept by concept: intervals of means cannot tell."""

from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.evaluation.compare_cells import Comparison
from sbora_diffusion.evaluation.compare_table import METRICS, estimate, read_cells

_COMPARED = METRICS | {"success": "Success"}


def differences(folder: Path, comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each other variant and K: the mean of its scores minus the first variant's at the same K.

    Taken over the (concept, seed) that both have, `n`; each with the interval of `bootstrap_interval` over these and
    the prompts. How much concepts differ from each other, which widens the intervals of both means, is not in it.
    """
    first, *others = comparison.variants
    rows = []
    for variant in others:
        for size in comparison.sizes:
            ours, theirs = (read_cells(folder, comparison, which, size) for which in (variant, first))
            shared = [key for key in ours if key in theirs]
            if shared:
                row: dict[str, Any] = {"variant": variant, "minus": first, "size": size, "n": len(shared)}
                for metric in _COMPARED:
                    both = [(ours[key].get(metric), theirs[key].get(metric)) for key in shared]
                    if all(None not in pair for pair in both):
                        scores = torch.tensor(both)  # (cells, 2, prompts)
                        row[metric] = estimate((scores[:, 0] - scores[:, 1]).T)
                rows.append(row)
    return rows


def differences_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a difference whose interval leaves out 0 is bold."""
    if not rows:
        return ""
    head = [f"minus {rows[0]['minus']}", "K", "n", *_COMPARED.values()]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        told = [_told(row[metric]) if metric in row else "–" for metric in _COMPARED]
        lines.append([row["variant"], str(row["size"]), str(row["n"]), *told])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _told(difference: dict[str, float]) -> str:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    text = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text
