"""What a comparison has found, written into its folder: tables, numbers and plots."""

import json
from pathlib import Path

from sbora_diffusion.evaluation.compare_paired import changes, differences, differences_table
from sbora_diffusion.evaluation.compare_plots import retention, scatter
from sbora_diffusion.evaluation.compare_table import summarise, table
from sbora_diffusion.evaluation.comparison import Comparison
from sbora_diffusion.utils.files import write_atomically


def write_comparison(folder: Path, comparison: Comparison, command: str) -> str:
    """table.md, table.json, scatter.png and, of merges, retention.png, of the cells there are; the first as text."""
    rows, paired, merged = (read(folder, comparison) for read in (summarise, differences, changes))
    text = "\n".join(part for part in (table(rows), differences_table(paired), differences_table(merged)) if part)
    told = {"command": command, "rows": rows, "differences": paired, "merged minus alone": merged}
    write_atomically(folder / "table.json", (json.dumps(told, indent=1) + "\n").encode())
    write_atomically(folder / "table.md", text.encode())
    if rows:
        scatter(rows, folder / "scatter.png")
    if merged:
        retention(merged, folder / "retention.png")
    return text
