"""A comparison's table in the published form, its scatter of text against image, and its retention over K."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.adapter.file import write_atomically
from sbora_diffusion.evaluation.alignment import bootstrap_interval
from sbora_diffusion.evaluation.compare_cells import Comparison, path_of, trained_as

OBJECTS = ("beer-mug", "birthday-cake", "christmas-tree", "pumpkin")  # all other concepts that ship are characters
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
            found = _cells(folder, comparison, variant, size)
            if found:
                rows.append({"variant": variant, "size": size, "n": len(found), **costs, **_scores(found)})
    return rows


def _cells(folder: Path, comparison: Comparison, variant: str, size: int) -> dict[tuple[str, int], dict[str, Any]]:
    cells = {}
    for seed in comparison.seeds:
        for names in comparison.groups(size):
            told = _read(path_of(folder, "scores", f"{variant}/{seed}/{'+'.join(names)}"))
            cells |= {(name, seed): scores for name, scores in told.items()}
    return cells


def _scores(cells: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for metric in METRICS:
        kinds = {"character": [], "object": [], "mean": []}
        for (name, _), cell in cells.items():
            kinds["object" if name in OBJECTS else "character"].append(cell[metric])
            kinds["mean"].append(cell[metric])
        scores[metric] = {kind: _estimate(torch.tensor(values).T) for kind, values in kinds.items() if values}
    return scores


def _estimate(values: Tensor) -> dict[str, float]:
    """Of (prompts, cells): the mean and its bootstrap 95 % interval over both."""
    low, high = bootstrap_interval(values)
    return {"mean": values.mean().item(), "low": low, "high": high}


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


def _told(estimate: dict[str, float] | None) -> str:
    return "–" if estimate is None else f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def write_comparison(folder: Path, comparison: Comparison, command: str) -> str:
    """comparison table.md, table.json, scatter.png and retention.png in the folder; the table."""
    rows = summarise(folder, comparison)
    told = {"command": command, "rows": rows}
    write_atomically(folder / "table.json", (json.dumps(told, indent=1) + "\n").encode())
    write_atomically(folder / "table.md", table(rows).encode())
    if rows:
        _scatter(rows, folder / "scatter.png")
        _retention(rows, folder / "retention.png")
    return table(rows)


def _scatter(rows: list[dict[str, Any]], path: Path) -> None:
    """Text against image alignment, a point a variant and K."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        x, y = row["text_mos"]["mean"], row["image"]["mean"]
        errors = [[[e["mean"] - e["low"]], [e["high"] - e["mean"]]] for e in (x, y)]
        axis.errorbar(x["mean"], y["mean"], errors[1], errors[0], marker="o", capsize=2, linewidth=1)
        axis.annotate(f"{row['variant']} K={row['size']}", (x["mean"], y["mean"]), (4, 4), textcoords="offset points")
    axis.set_xlabel("text alignment (mos)")
    axis.set_ylabel("image alignment")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _retention(rows: list[dict[str, Any]], path: Path) -> None:
    """Both metrics over K, a line a variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            own = [row for row in rows if row["variant"] == variant]
            axis.plot([r["size"] for r in own], [r[metric]["mean"]["mean"] for r in own], marker="o", label=variant)
        axis.set_xticks(sorted({row["size"] for row in rows}))
        axis.set_xlabel("concepts merged (K)")
        axis.set_ylabel(f"{title.lower()} alignment")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
