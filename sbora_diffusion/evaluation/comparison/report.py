"""Write a comparison's results into its folder: tables, scores and plots."""

import json
from pathlib import Path

from sbora_diffusion.evaluation.comparison.paired import changes, compared_metrics, differences, differences_table
from sbora_diffusion.evaluation.comparison.plan import Comparison
from sbora_diffusion.evaluation.comparison.plots import retention, scatter
from sbora_diffusion.evaluation.comparison.table import summarise, table, table_metrics
from sbora_diffusion.utils.files import write_file


def write_comparison(folder: Path, comparison: Comparison, command: str) -> str:
    """Write table.md, table.json, scatter.png and, for merges, retention.png of the existing cells; return table.md."""
    rows, paired, merged = (read(folder, comparison) for read in (summarise, differences, changes))
    in_table, compared = table_metrics(comparison), compared_metrics(comparison)
    tables = [table(rows, in_table), differences_table(paired, compared), differences_table(merged, compared)]
    text = "\n".join(part for part in tables if part)
    content = {"command": command, "rows": rows, "differences": paired, "merged minus single": merged}
    write_file(folder / "table.json", (json.dumps(content, indent=1) + "\n").encode(), overwrite=True)
    write_file(folder / "table.md", text.encode(), overwrite=True)
    if rows and len(in_table) > 1:
        scatter(rows, in_table, folder / "scatter.png")
    if merged:
        retention(merged, compared, folder / "retention.png")
    return text
