"""Commands that measure: eval, compare."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import ADAPTERS, convert, hide_loading_bars, imported_for_good, parse_settings
from sbora_diffusion.cli.options import Base, Settings


def evaluate(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Trained concepts.")],
    merged: Annotated[str, typer.Option(metavar="NAME|FILE", help="A merge of them, to compare with.")] = "",
    suite: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The prompts; default: emoji64 or objects, by the base.")
    ] = "",
    encoder: Annotated[
        str,
        typer.Option(metavar="ID", help="The judge: emoji-clip, a CLIP's folder or hub id, open_clip:NAME/WEIGHTS."),
    ] = "",
    concept: Annotated[list[str], typer.Option(metavar="DIR", help="Images of a concept of yours.")] = [],  # noqa: B006
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapters were trained for.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: a folder in evaluations, by the names.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Throw away another evaluation's images in --out.")] = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Score how well concepts do what prompts say, alone and merged; run again, it goes on where it was.

    Settings: seeds (images a prompt), steps and guidance (default: what is usual for the base), negative_prompt,
    batch_size, vision (a second judge).
    """
    kinds = {"seeds": int, "steps": int, "guidance": float, "negative_prompt": str, "batch_size": int, "vision": str}
    options = convert(parse_settings(settings), kinds)
    with imported_for_good():
        from sbora_diffusion.cli.eval import EvaluationProgress
        from sbora_diffusion.evaluation.evaluate import evaluate as run_evaluation
        from sbora_diffusion.evaluation.reports.tables import summary

        hide_loading_bars()
    vision, seeds, batch_size = options.pop("vision", ""), options.pop("seeds", 4), options.pop("batch_size", 8)
    with EvaluationProgress() as progress:
        report = run_evaluation(
            names,
            merged or None,
            base=base,
            suite=suite,
            judge=encoder,
            other_judges=[f"vision:{vision}"] if vision else [],
            concepts=concept,
            seeds=range(seeds),
            sampling=options,
            batch_size=batch_size,
            library=ADAPTERS,
            folder=out,
            force=force,
            command=shlex.join(["sbora-diffusion", *sys.argv[1:]]),
            on_image=progress.show,
        )
    typer.echo(f"{summary(report)}\n")
    for path in report.files:
        typer.echo(path)


def compare(
    methods: Annotated[str, typer.Option(metavar="NAME …", help="Such as: sbora-fa lora lora:rank=4,steps=200")],
    concepts: Annotated[str, typer.Option(metavar="NAME …", help="Concepts that ship, or of ./concepts.")],
    merge: Annotated[str, typer.Option(metavar="K,…", help="How many are merged at once; 1 is each alone.")] = "1",
    seeds: Annotated[str, typer.Option(metavar="N,…", help="Of trainings and images.")] = "0,1,2",
    base: Base = "emoji64",
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Cells at once.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where all cells lie; what is there is kept.")] = Path(
        "comparison"
    ),
    settings: Settings = [],  # noqa: B006
) -> None:
    """Train and judge concepts by several methods: a table, and plots beside it; run again, it goes on.

    --set is for all recipes (steps=200), besides suite and encoder; a learning rate sweep is a method several times.
    """
    try:
        sizes, numbers = (tuple(int(part) for part in text.split(",")) for text in (merge, seeds))
    except ValueError:
        raise typer.BadParameter(f"got {merge} and {seeds}, expected whole numbers") from None
    with imported_for_good():
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
