"""The train command."""

import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    RUNS,
    Base,
    Force,
    ProgressBar,
    Settings,
    convert,
    hide_loading_bars,
    parse_settings,
    suggest,
)

if TYPE_CHECKING:
    from sbora_diffusion.training.run import TrainingResult
    from sbora_diffusion.training.train import Request, TrainingInterrupted

log = logging.getLogger(__name__)


def train(
    concept: Annotated[
        list[str], typer.Option(metavar="NAME|DIR", help="A concept that ships, or a folder of images; repeatable.")
    ],
    base: Base = "emoji64",
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Such as sbora-fa, sbora-fb, lora: docs/methods.md.")
    ] = "sbora-fa",
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Columns or rows of each layer; default: the recipe's.")
    ] = None,
    interval: Annotated[str, typer.Option(metavar="A:B", help="The columns to own; default: the first free.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    force: Force = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Train a concept: writes adapters/NAME.safetensors.

    --set takes every setting of docs/training.md, such as steps=400 or precision=bf16. Several concepts are trained in
    one process each, with columns reserved for all at the start; repeating the command continues where it was stopped.
    --set jobs=2 trains two at a time, --set cluster=1 on a Ray cluster.
    """
    from sbora_diffusion.library.library import Library
    from sbora_diffusion.training.train import Request

    hide_loading_bars()
    overrides = parse_settings(settings) | ({} if rank is None else {"rank": str(rank)})
    if len(concept) > 1:
        if interval:
            raise typer.BadParameter("several concepts cannot have one interval", param_hint="--interval")
        paths = _train_several(concept, base, method, overrides, force)
    else:
        request = Request(
            concept=concept[0],
            base=base,
            method=method,
            interval=interval or None,
            settings=overrides,
            library=Library(ADAPTERS),
            runs=RUNS,
            resume=resume,
            overwrite=force,
        )
        result = _train(request)
        paths = [result.path, result.before_after] if result.path else []
    for path in paths:
        typer.echo(path)


def _train(request: "Request") -> "TrainingResult":
    from sbora_diffusion.training.train import TrainingInterrupted, train_concept

    try:
        with ProgressBar("preparing") as progress:
            result = train_concept(request, on_step=progress.show_step)
    except TrainingInterrupted as stopped:
        raise KeyboardInterrupt(_how_to_resume(stopped)) from None
    if result.path:
        name = result.path.stem if result.path.parent == request.library.folder else result.path
        token = next(iter(result.adapter.spec.tokens))
        suggest("generate", f"a {token} on the beach", "--adapter", name)
    return result


def _train_several(
    concepts: list[str], base: str, method: str, overrides: Mapping[str, str], force: bool
) -> list[Path]:
    from sbora_diffusion.library.library import Library
    from sbora_diffusion.training.fan_out import fan_out

    jobs = {key: overrides[key] for key in ("jobs", "cluster") if key in overrides}
    how = convert({"jobs": "1", "cluster": "0"} | jobs, {"jobs": int, "cluster": int})
    others = {key: value for key, value in overrides.items() if key not in jobs}
    return fan_out(concepts, base, method, others, library=Library(ADAPTERS), runs=RUNS, force=force, **how)


def _how_to_resume(stopped: "TrainingInterrupted") -> str:
    if int(os.environ.get("RANK", "0")):
        return ""
    command = shlex.join(["sbora-diffusion", *(word for word in sys.argv[1:] if word != "--resume")])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = f"torchrun … -m sbora_diffusion {command.removeprefix('sbora-diffusion ')}"
    if stopped.has_checkpoint:
        return f"stopped; the last checkpoint is kept in {stopped.run_folder}, resume with: {command} --resume"
    return f"stopped before the first checkpoint, start again with: {command}"
