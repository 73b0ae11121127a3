"""`sbora-diffusion compare`: train and score concepts by several methods, each cell in a process of its own."""

import logging
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbora_diffusion.cli.options import Base, Settings, parse_settings
from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.evaluation.comparison import Comparison

log = logging.getLogger(__name__)

# what the process of a cell runs
CELL = """
import sys
from pathlib import Path
from sbora_diffusion.cli.console import collect_garbage_less
collect_garbage_less()
from sbora_diffusion.evaluation.compare_cells import run_cell
run_cell(Path(sys.argv[1]), *sys.argv[2:])
"""


def compare(
    methods: Annotated[str, typer.Option(metavar="NAME …", help="Such as: sbora-fa lora lora:rank=4,steps=200")],
    concepts: Annotated[str, typer.Option(metavar="NAME …", help="Shipped concepts, or those of ./concepts.")],
    merge: Annotated[str, typer.Option(metavar="K,…", help="Sizes of the merges; 1 is each concept by itself.")] = "1",
    seeds: Annotated[str, typer.Option(metavar="N,…", help="Seeds of trainings and images.")] = "0,1,2",
    base: Base = "emoji64",
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Cells to run at once.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of all cells; finished ones are kept.")] = Path(
        "comparison"
    ),
    settings: Settings = [],  # noqa: B006
) -> None:
    """Train and score concepts by several methods: a table, and plots beside it; run it again to resume.

    --set applies to all recipes (steps=200), besides suite and encoder; for a sweep of learning rates, list a method
    several times.
    """
    try:
        sizes, numbers = (tuple(int(part) for part in text.split(",")) for text in (merge, seeds))
    except ValueError:
        raise typer.BadParameter(f"got {merge} and {seeds}, expected whole numbers") from None
    from sbora_diffusion.evaluation.comparison import Comparison

    shared = parse_settings(settings)
    suite, judge = shared.pop("suite", "emoji64"), shared.pop("encoder", "emoji-clip")
    comparison = Comparison(
        variants=tuple(methods.split()),
        concepts=tuple(concepts.split()),
        seeds=numbers,
        sizes=sizes,
        base=base,
        suite=suite,
        judge=judge,
        settings=shared,
    )
    typer.echo(compare_methods(comparison, out, jobs))


def compare_methods(comparison: "Comparison", folder: Path, jobs: int) -> str:
    """Run the missing cells, `jobs` at once, and return the table of all.

    Raises:
        SboraError: an unknown method or setting, another comparison in the folder, cells that failed (the others are
            run all the same).
    """
    from sbora_diffusion.evaluation.compare_report import write_comparison

    _warn_of_budgets(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    comparison.save(folder)
    failed = _run_missing(folder, "trained", comparison.trainings(), jobs)
    failed += _run_missing(folder, "scores", comparison.merges(), jobs) if not failed else []
    table = write_comparison(folder, comparison, shlex.join(["sbora-diffusion", *sys.argv[1:]]))
    if failed:
        raise SboraError(f"{len(failed)} cells failed: {', '.join(failed)}", f"see {folder}/logs, and run it again")
    return table


def _warn_of_budgets(comparison: "Comparison") -> None:
    """Warn if recipes train on different numbers of images or prior samples."""
    budgets: dict[str, str] = {}
    for variant in comparison.variants:
        config = comparison.config(variant, 0)
        images = config.data.batch_size * config.optim.accumulation
        prior = config.loss.prior_batch * config.optim.accumulation
        budgets.setdefault(f"{config.optim.steps} × ({images} + {prior})", variant)
    if len(budgets) > 1:
        listed = ", ".join(f"{variant} {budget}" for budget, variant in budgets.items())
        log.warning(
            "steps × (images + prior samples) differ: %s; to equalise: --set steps=N, batch_size=N and prior_batch=N",
            listed,
        )


def _run_missing(folder: Path, kind: str, keys: Iterable[str], jobs: int) -> list[str]:
    """Run the cells without a result, and return the keys of those that failed."""
    from sbora_diffusion.evaluation.comparison import path_of

    missing = [key for key in dict.fromkeys(keys) if not path_of(folder, kind, key).exists()]
    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(lambda key: _run_cell(folder, kind, key), missing))
    return [key for key, success in zip(missing, succeeded, strict=True) if not success]


def _run_cell(folder: Path, kind: str, key: str) -> bool:
    log.info("%s: %s", kind, key)
    path = folder / "logs" / kind / f"{key}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", CELL, str(folder), kind, key]
    with path.open("wb") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode == 0
