"""Run a comparison: compute the missing cells, each in a process of its own, then write tables and plots."""

import json
import logging
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sbora_diffusion.evaluation.comparison.plan import Comparison, path_of
from sbora_diffusion.evaluation.comparison.plots import retention, scatter
from sbora_diffusion.evaluation.comparison.tables import (
    changes,
    compared_metrics,
    differences,
    differences_table,
    summarise,
    table,
)
from sbora_diffusion.evaluation.judges import metrics_of
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import write_file
from sbora_diffusion.utils.processes import isolated

log = logging.getLogger(__name__)

_CELLS = "sbora_diffusion.evaluation.comparison.cells"


def compare(comparison: Comparison, folder: Path, jobs: int = 1, command: str = "") -> str:
    """Compute the cells that are missing in the folder, `jobs` at once; write and return the tables of all cells.

    Args:
        command: how the results say they were made.

    Raises:
        SboraError: an unknown method or setting, another comparison in the folder, cells that failed (after all others
            are computed).
    """
    _warn_of_different_budgets(comparison)
    comparison.save(folder)
    failed = _compute(folder, "trained", comparison.trainings(), jobs)
    failed += _compute(folder, "scores", comparison.merges(), jobs) if not failed else []
    tables = write_comparison(folder, comparison, command)
    if failed:
        raise SboraError(f"{len(failed)} cells failed: {', '.join(failed)}", f"see {folder}/logs, and run it again")
    return tables


def _warn_of_different_budgets(comparison: Comparison) -> None:
    """Log a warning if recipes learn from different numbers of images or prior samples."""
    budgets: dict[str, str] = {}
    for variant in comparison.variants:
        config = comparison.config(variant, 0)
        images = config.data.batch_size * config.optim.accumulation
        prior = config.loss.prior_batch * config.optim.accumulation
        budgets.setdefault(f"{config.optim.steps} × ({images} + {prior})", variant)
    if len(budgets) > 1:
        listed = ", ".join(f"{variant} {budget}" for budget, variant in budgets.items())
        log.warning(
            "steps × (images + prior samples) differ: %s; make them equal by steps, batch_size and prior_batch",
            listed,
        )


def _compute(folder: Path, kind: str, keys: Iterable[str], jobs: int) -> list[str]:
    """Compute the cells that have no result yet, and return the keys of those that failed."""
    missing = [key for key in dict.fromkeys(keys) if not path_of(folder, kind, key).exists()]
    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(lambda key: _in_process(folder, kind, key), missing))
    return [key for key, success in zip(missing, succeeded, strict=True) if not success]


def _in_process(folder: Path, kind: str, key: str) -> bool:
    log.info("%s: %s", kind, key)
    path = folder / "logs" / kind / f"{key}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = isolated("-m", _CELLS, str(folder), kind, key)
    with path.open("wb") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode == 0


def write_comparison(folder: Path, comparison: Comparison, command: str) -> str:
    """Write table.md, table.json, scatter.png and, for merges, retention.png of the existing cells; return table.md."""
    rows, paired, merged = (read(folder, comparison) for read in (summarise, differences, changes))
    compared = compared_metrics(comparison)
    in_table = {key: compared[key] for key, metric in metrics_of(comparison.judge).items() if metric.in_table}
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
