"""`sbora-diffusion eval`: how well concepts do what prompts say, by themselves and merged."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    AdapterBase,
    ProgressBar,
    Settings,
    convert,
    hide_loading_bars,
    parse_settings,
)

KINDS = {"seeds": int, "steps": int, "guidance": float, "negative_prompt": str, "batch_size": int, "vision": str}
SAMPLING = ("steps", "guidance", "negative_prompt")


def evaluate(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Trained concepts.")],
    merged: Annotated[str, typer.Option(metavar="NAME|FILE", help="A merge of them, to compare with.")] = "",
    suite: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The prompts; default: emoji64 or objects, by the base model.")
    ] = "",
    encoder: Annotated[
        str,
        typer.Option(metavar="ID", help="The judge: emoji-clip, a CLIP's folder or hub id, open_clip:NAME/WEIGHTS."),
    ] = "",
    concept: Annotated[list[str], typer.Option(metavar="DIR", help="Images of your own concept; repeatable.")] = [],  # noqa: B006
    base: AdapterBase = "",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: a folder in evaluations, named after the concepts.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Delete another evaluation's images in --out.")] = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Score how well concepts do what prompts say, by themselves and merged; run it again to resume.

    Settings: seeds (images per prompt), steps and guidance (default: the base model's), negative_prompt, batch_size,
    vision (a second judge).
    """
    options = convert(parse_settings(settings), KINDS)
    import sbora_diffusion as sbora
    from sbora_diffusion.evaluation.report import summary

    hide_loading_bars()
    sampling = {key: options.pop(key) for key in SAMPLING if key in options}
    if "seeds" in options:
        options["seeds"] = range(options["seeds"])
    if vision := options.pop("vision", ""):
        options["other_judges"] = [f"vision:{vision}"]
    with ProgressBar("loading") as progress:
        report = sbora.evaluate(
            names,
            merged or None,
            base=base,
            suite=suite,
            judge=encoder,
            concepts=concept,
            sampling=sampling,
            library=ADAPTERS,
            folder=out,
            force=force,
            command=shlex.join(["sbora-diffusion", *sys.argv[1:]]),
            on_image=progress.show_images,
            **options,
        )
    typer.echo(f"{summary(report)}\n")
    for path in report.files:
        typer.echo(path)
