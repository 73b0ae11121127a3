"""The compare command: every cell one process, made once; then the table and the plots of what is there."""

import logging
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sbora_diffusion.evaluation.compare_report import write_comparison
from sbora_diffusion.evaluation.comparison import Comparison, path_of
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

# what the process of a cell runs
CELL = """
import sys
from pathlib import Path
from sbora_diffusion.cli.console import imported_for_good
with imported_for_good():
    from sbora_diffusion.evaluation.compare_cells import run_cell
run_cell(Path(sys.argv[1]), *sys.argv[2:])
"""


def compare_methods(comparison: Comparison, folder: Path, jobs: int) -> str:
    """Make the cells that are missing, `jobs` at once; the table of all.

    Raises:
        SboraError: an unknown method or setting, another comparison in the folder, cells that failed (the others are
            made all the same).
    """
    _tell_budgets(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    comparison.save(folder)
    failed = _make(folder, "trained", comparison.trainings(), jobs)
    failed += _make(folder, "scores", comparison.merges(), jobs) if not failed else []
    told = write_comparison(folder, comparison, shlex.join(["sbora-diffusion", *sys.argv[1:]]))
    if failed:
        raise SboraError(f"{len(failed)} cells failed: {', '.join(failed)}", f"see {folder}/logs, and run it again")
    return told


def _tell_budgets(comparison: Comparison) -> None:
    """Warn where recipes do not learn from as many images, or prior samples."""
    budgets: dict[str, str] = {}
    for variant in comparison.variants:
        config = comparison.config(variant, 0)
        images, prior = (
            config.data.batch_size * config.optim.accumulation,
            config.loss.prior_batch * config.optim.accumulation,
        )
        budgets.setdefault(f"{config.optim.steps} × ({images} + {prior})", variant)
    if len(budgets) > 1:
        told = ", ".join(f"{variant} {budget}" for budget, variant in budgets.items())
        log.warning(
            "steps × (images + prior samples) differ: %s; alike: --set steps=N, batch_size=N and prior_batch=N",
            told,
        )


def _make(folder: Path, kind: str, keys: Iterable[str], jobs: int) -> list[str]:
    """Run the cells that have no result yet; the keys of those that failed."""
    missing = [key for key in dict.fromkeys(keys) if not path_of(folder, kind, key).exists()]
    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(lambda key: _in_a_process(folder, kind, key), missing))
    return [key for key, success in zip(missing, succeeded, strict=True) if not success]


def _in_a_process(folder: Path, kind: str, key: str) -> bool:
    log.info("%s: %s", kind, key)
    path = folder / "logs" / kind / f"{key}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", CELL, str(folder), kind, key]
    with path.open("wb") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode == 0
