"""`sbora-diffusion compare`: train and score concepts by several methods, each cell in a process of its own."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import Base, Settings, parse_settings


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
    from sbora_diffusion.evaluation.comparison.plan import Comparison
    from sbora_diffusion.evaluation.comparison.run import compare as run_comparison

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
    typer.echo(run_comparison(comparison, out, jobs, shlex.join(["sbora-diffusion", *sys.argv[1:]])))
