"""The train command, until cli/train.py defines it."""

from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_loading_bars
from sbora_diffusion.cli.options import ADAPTERS, RUNS, Base, Force, Settings, convert, parse_settings


def train(
    concept: Annotated[
        list[str], typer.Option(metavar="NAME|DIR", help="A concept that ships, or a folder of images; repeatable.")
    ],
    base: Base = "emoji64",
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Such as sbora-fa, sbora-fb, lora: docs/methods.md.")
    ] = "sbora-fa",
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Columns or rows a layer; default: the recipe's.")
    ] = None,
    interval: Annotated[str, typer.Option(metavar="A:B", help="Pin the columns, instead of the first free.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    force: Force = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Learn a concept: writes adapters/NAME.safetensors.

    --set takes every setting, such as steps=400, recipe=loud or precision=bf16: docs/training.md has them all. Several
    concepts are learned in a process each, with columns reserved for all at the start; the same command goes on where
    it was stopped. --set jobs=2 runs two at a time, --set cluster=1 runs them on a Ray cluster.
    """
    from sbora_diffusion.cli.train import Request, train_concept
    from sbora_diffusion.library.library import Library

    hide_loading_bars()
    overrides = parse_settings(settings) | ({} if rank is None else {"rank": str(rank)})
    library = Library(ADAPTERS)
    if len(concept) > 1:
        from sbora_diffusion.training.fan_out import fan_out

        if interval:
            raise typer.BadParameter("several concepts cannot have one interval", param_hint="--interval")
        own = {key: overrides.pop(key) for key in ("jobs", "cluster") if key in overrides}
        how = convert({"jobs": "1", "cluster": "0"} | own, {"jobs": int, "cluster": int})
        paths = fan_out(concept, base, method, overrides, library=library, runs=RUNS, force=force, **how)
    else:
        request = Request(
            concept=concept[0], base=base, method=method, interval=interval, overrides=overrides, force=force
        )
        paths = train_concept(request, library=library, runs=RUNS, resume=resume)
    for path in paths:
        typer.echo(path)
