"""What a comparison has found, written into its folder: tables, numbers and plots."""

import json
from pathlib import Path

from sbora_diffusion.adapter.file import write_atomically
from sbora_diffusion.evaluation.compare_cells import Comparison
from sbora_diffusion.evaluation.compare_paired import differences, differences_table
from sbora_diffusion.evaluation.compare_plots import retention, scatter
from sbora_diffusion.evaluation.compare_table import summarise, table


def write_comparison(folder: Path, comparison: Comparison, command: str) -> str:
    """table.md, table.json, scatter.png and retention.png of the cells that are there; the text of the first."""
    rows, paired = summarise(folder, comparison), differences(folder, comparison)
    text = "\n".join(part for part in (table(rows), differences_table(paired)) if part)
    told = {"command": command, "rows": rows, "differences": paired}
    write_atomically(folder / "table.json", (json.dumps(told, indent=1) + "\n").encode())
    write_atomically(folder / "table.md", text.encode())
    if rows:
        scatter(rows, folder / "scatter.png")
        retention(rows, folder / "retention.png")
    return text
