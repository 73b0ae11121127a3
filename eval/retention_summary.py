"""The retention study's results: means and intervals of the computed cells, as JSON, a table and a plot."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retention_bench import METRICS
from retention_study import Study, planned

from sbora_diffusion.evaluation.comparison.tables import grid, markdown
from sbora_diffusion.evaluation.metrics import Estimate, format_estimate
from sbora_diffusion.training.checkpoint import versions
from sbora_diffusion.utils.files import write_file

log = logging.getLogger("retention")

TITLES = {"text_mos": "text alignment (mos)", "image": "image alignment", "success": "recognised among 16"}


def summarise(study: Study, schemes: Sequence[str], seeds: Sequence[int]) -> dict:
    """Return means with bootstrap 95 % intervals over prompts, concepts and seeds, and the number of missing cells."""
    rows, missing = [], 0
    for scheme in schemes:
        found = {seed: study.found(scheme, seed) for seed in seeds}
        for how, size in dict.fromkeys((how, size) for how, size, _ in planned(study)):
            pairs = {(name, seed): (found[seed].scores(how, size, name), found[seed].scores("single", 1, name))
                     for seed in seeds for name in study.concepts}  # fmt: skip
            both = {key: (cell, single) for key, (cell, single) in pairs.items() if cell and single}
            missing += len(pairs) - len(both)
            if not both:
                continue
            row: dict = {"scheme": scheme, "how": how, "size": size, "cells": len(both)}
            for metric in METRICS:
                after, before = (grid({key: pair[i][metric] for key, pair in both.items()}) for i in (0, 1))
                row[metric] = Estimate.of(after).rounded(4)
                row[f"{metric} change"] = Estimate.of(after - before).rounded(4)
                row[f"{metric} retention"] = (after.nanmean() / before.nanmean()).item()
            merges = [found[seed].merged(how, names) for seed in seeds for names in study.groups(size)]
            done = [each for each in merges if each]
            for key in ("seconds", "objective"):
                row[key] = sum(each[key] for each in done) / len(done) if done else None
            rows.append(row)
    return {"command": "python " + " ".join(sys.argv), "base": study.base, "judge": study.judge, "suite": study.suite,
            "sampling steps": study.sampling_steps,
            "concepts": study.concepts, "seeds": list(seeds), "missing cells": missing, "versions": versions(),
            "rows": rows}  # fmt: skip


def table(summary: Mapping) -> str:
    """Return the summary's rows in Markdown."""
    head = ["columns", "merge", "K", "n", "text", "image", "success"]
    lines = []
    for row in summary["rows"]:
        scores = [_score(row, metric) for metric in METRICS]
        retained = [f"{row[f'{m} retention']:.1%}" for m in ("image", "success")]
        merged = ["–" if row[key] is None else f"{row[key]:.3g}" for key in ("objective", "seconds")]
        lines.append([row["scheme"], row["how"], str(row["size"]), str(row["cells"]), *scores, *retained, *merged])
    return markdown([*head, "image retained", "success retained", "objective", "s"], lines)


def _score(row: Mapping, metric: str) -> str:
    """Return a mean with its interval; of a merge the mean, and its difference from the single concepts."""
    if row["how"] == "single":
        return format_estimate(row[metric])
    return f"{row[metric]['mean']:.3f} ({format_estimate(row[f'{metric} change'], '+')})"


def write_table(summary: Mapping, out: Path) -> None:
    """Write the summary as JSON, and its table in Markdown beside it."""
    write_file(out, (json.dumps(summary, indent=1) + "\n").encode(), overwrite=True)
    write_file(out.with_suffix(".md"), table(summary).encode(), overwrite=True)


def write_summary(summary: Mapping, out: Path) -> None:
    """Write JSON, table and plot."""
    write_table(summary, out)
    plot(summary, out.with_suffix(".png"))
    log.info("%s; %d cells are missing", out, summary["missing cells"])


def plot(summary: Mapping, path: Path) -> None:
    """Plot every metric's change over K: a panel for each metric and choice of columns, a line for each merge."""
    from matplotlib.figure import Figure

    schemes = list(dict.fromkeys(row["scheme"] for row in summary["rows"]))
    hows = list(dict.fromkeys(row["how"] for row in summary["rows"] if row["how"] != "single"))
    figure = Figure(figsize=(4 * len(METRICS), 2.8 * max(1, len(schemes))), layout="constrained")
    axes = figure.subplots(max(1, len(schemes)), len(METRICS), squeeze=False, sharex=True, sharey="col")
    for panels, scheme in zip(axes, schemes, strict=False):
        for axis, metric in zip(panels, METRICS, strict=True):
            _plot_panel(axis, metric, [row for row in summary["rows"] if row["scheme"] == scheme], hows)
            axis.set_title(f"{TITLES[metric]}, {scheme} columns", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("concepts merged (K)")
    for panels in axes:
        panels[0].set_ylabel("merged − single")
    lines = {how: line for axis in axes.flat for line, how in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][0].legend(lines.values(), lines, frameon=False, fontsize="small", loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_panel(axis: Any, metric: str, rows: Sequence[Mapping], hows: Sequence[str]) -> None:
    """Plot one panel: the mean difference of a concept's scores in a merge and by itself, with intervals."""
    axis.axhline(0, color="0.7", linewidth=1)
    for number, how in enumerate(hows):
        line = [row for row in rows if row["how"] == how]
        if not line:
            continue
        changes = [row[f"{metric} change"] for row in line]
        means = [change["mean"] for change in changes]
        below = [change["mean"] - change["low"] for change in changes]
        above = [change["high"] - change["mean"] for change in changes]
        places, look = [row["size"] + 0.12 * (number - 1) for row in line], {"color": f"C{number}", "label": how}
        axis.errorbar(places, means, [below, above], **look, marker="o", markersize=3, capsize=2, linewidth=1)
    axis.set_xticks(sorted({row["size"] for row in rows}))
    axis.spines[["top", "right"]].set_visible(False)
