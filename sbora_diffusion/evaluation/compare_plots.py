"""A comparison to look at: text against image alignment at each K, and what merging K concepts changes."""

from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

from sbora_diffusion.evaluation.compare_paired import COMPARED

_MARKS = "osD^vP*X"  # with ten colours, so that no two of many variants look the same


def scatter(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each K, a point with its intervals for each variant."""
    from matplotlib.figure import Figure

    sizes, looks = sorted({row["size"] for row in rows}), _looks(rows)
    figure = Figure(figsize=(1 + 3.5 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, size in zip(panels, sizes, strict=True):
        for row in (row for row in rows if row["size"] == size):
            x, y = row["text_mos"]["mean"], row["image"]["mean"]
            spread = [[[e["mean"] - e["low"]], [e["high"] - e["mean"]]] for e in (x, y)]
            bars = {"ecolor": (*looks[row["variant"]]["color"], 0.2), "linestyle": "none"}
            panel.errorbar(x["mean"], y["mean"], spread[1], spread[0], **looks[row["variant"]], **bars)
        panel.set_title("alone" if size == 1 else f"{size} merged", fontsize="medium")
        panel.set_xlabel("text alignment (mos)")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("image alignment")
    _legend(figure, looks)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def retention(rows: list[dict[str, Any]], path: Path) -> None:
    """What a merge of K changes against alone, each metric over K: a line with its intervals for each variant."""
    from matplotlib.figure import Figure

    looks, sizes = _looks(rows), sorted({1} | {row["size"] for row in rows})
    metrics = [metric for metric in COMPARED if all(metric in row for row in rows)]
    figure = Figure(figsize=(1 + 4 * len(metrics), 3.6), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        panel.axhline(0, color="0.8", linewidth=1)
        for variant, look in looks.items():
            own = [row for row in rows if row["variant"] == variant]
            mean, low, high = ([0.0, *(row[metric][key] for row in own)] for key in ("mean", "low", "high"))
            spread = [[abs(edge - m) for m, edge in zip(mean, edges, strict=True)] for edges in (low, high)]
            panel.errorbar([1, *(row["size"] for row in own)], mean, spread, ecolor=(*look["color"], 0.2), **look)
        panel.set_xticks(sizes)
        panel.set_xlabel("concepts merged (K)")
        panel.set_ylabel(f"{COMPARED[metric].lower()}, merged minus alone")
        panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, looks)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _looks(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Colour and mark of each variant."""
    from matplotlib import colormaps

    variants = dict.fromkeys(row["variant"] for row in rows)
    colours, marks = cycle(colormaps["tab10"].colors), cycle(_MARKS)  # pyright: ignore[reportAttributeAccessIssue]
    return {v: {"color": c, "marker": m, "label": v} for v, c, m in zip(variants, colours, marks, strict=False)}


def _legend(figure: Any, looks: dict[str, dict[str, Any]]) -> None:
    """One for all panels, below them, whatever each of them shows, in as many columns as its longest name allows."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], linestyle="none", **look) for look in looks.values()]
    width, height = figure.get_size_inches()
    columns = min(3, max(1, int(width / (0.5 + 0.07 * max(map(len, looks))))))  # inches of a mark and of a letter
    figure.set_figheight(height + 0.2 * ceil(len(looks) / columns))
    figure.legend(handles=marks, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
