"""Plots of a comparison: text against image alignment at each K, and the changes by merging K concepts."""

from collections.abc import Mapping
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

_MARKS = "osD^vP*X"  # combined with ten colours, so that many variants look different


def scatter(rows: list[dict[str, Any]], metrics: Mapping[str, str], path: Path) -> None:
    """Plot the first metric against the second: a panel for each K, a point with its intervals for each variant."""
    from matplotlib.figure import Figure

    (across, across_title), (up, up_title), *_ = metrics.items()
    sizes, looks = sorted({row["size"] for row in rows}), _looks(rows)
    figure = Figure(figsize=(1 + 3.5 * len(sizes), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, size in zip(panels, sizes, strict=True):
        for row in (row for row in rows if row["size"] == size):
            x, y = row[across]["mean"], row[up]["mean"]
            spread = [[[e["mean"] - e["low"]], [e["high"] - e["mean"]]] for e in (x, y)]
            bars = {"ecolor": (*looks[row["variant"]]["color"], 0.2), "linestyle": "none"}
            panel.errorbar(x["mean"], y["mean"], spread[1], spread[0], **looks[row["variant"]], **bars)
        panel.set_title("single concepts" if size == 1 else f"{size} merged", fontsize="medium")
        panel.set_xlabel(f"{across_title.lower()} alignment")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{up_title.lower()} alignment")
    _legend(figure, looks)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def retention(rows: list[dict[str, Any]], compared: Mapping[str, str], path: Path) -> None:
    """Plot the change by a merge of K, each metric over K: a line with its intervals for each variant."""
    from matplotlib.figure import Figure

    looks, sizes = _looks(rows), sorted({1} | {row["size"] for row in rows})
    metrics = [metric for metric in compared if all(metric in row for row in rows)]
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
        panel.set_ylabel(f"{compared[metric].lower()}, merged minus single")
        panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, looks)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _looks(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return colour and mark of each variant."""
    from matplotlib import colormaps

    variants = dict.fromkeys(row["variant"] for row in rows)
    colours, marks = cycle(colormaps["tab10"].colors), cycle(_MARKS)  # pyright: ignore[reportAttributeAccessIssue]
    return {v: {"color": c, "marker": m, "label": v} for v, c, m in zip(variants, colours, marks, strict=False)}


def _legend(figure: Any, looks: dict[str, dict[str, Any]]) -> None:
    """Add one legend for all panels below them, in as many columns as its longest name allows."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], linestyle="none", **look) for look in looks.values()]
    width, height = figure.get_size_inches()
    columns = min(3, max(1, int(width / (0.5 + 0.07 * max(map(len, looks))))))  # inches of a mark and of a letter
    figure.set_figheight(height + 0.2 * ceil(len(looks) / columns))
    figure.legend(handles=marks, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
