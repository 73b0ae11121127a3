"""Commands that give concepts to other programs and take them from there: export, import, bake."""

from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import ADAPTERS, hide_loading_bars, imported_for_good, parse_numbers
from sbora_diffusion.cli.options import EXPORTS, PIPELINES, Force, Numbers


def export(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A concept, or a merge of several.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="diffusers, kohya (ComfyUI, A1111, Forge) or peft.")],
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapter was trained for.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: exports/NAME-FORMAT.")] = None,
    force: Force = False,
) -> None:
    """Write a concept as files that other programs load: an ordinary LoRA, and its learned tokens."""
    with imported_for_good():
        from sbora_diffusion.cli.exchange_files import export_concept
        from sbora_diffusion.library.library import Library

        hide_loading_bars()
    for path in export_concept(name, to, base, library=Library(ADAPTERS), exports=EXPORTS, out=out, force=force):
        typer.echo(path)


def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A LoRA file, a PEFT folder, or a concept file.")],
    embedding: Annotated[list[Path], typer.Option(metavar="FILE", help="A learned token; repeatable.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the concept; default: what the file says.")] = "",
    noun: Annotated[str, typer.Option(metavar="WORD", help="Class of tokens whose files do not say it.")] = "",
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the file says.")] = "",
    collision: Annotated[
        str, typer.Option(metavar="refuse|keep", help="What if others in ./adapters own the same columns.")
    ] = "refuse",
    force: Force = False,
) -> None:
    """Take in a concept that was trained elsewhere, if it is an SBoRA adapter: writes adapters/NAME.safetensors."""
    with imported_for_good():
        from sbora_diffusion.cli.exchange_files import import_concept
        from sbora_diffusion.library.library import Library

        hide_loading_bars()
    library = Library(ADAPTERS)
    typer.echo(import_concept(path, embedding, name, noun, base, library=library, collision=collision, force=force))


def bake(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="What to write into the weights.")],
    strengths: Numbers = "",
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapters were trained for.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: pipelines/NAME+NAME.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a pipeline that was baked before.")] = False,
) -> None:
    """Write a whole pipeline folder with concepts in it, for any program that loads diffusers' format.

    Takes what `merge` cannot: columns with rows, several seeds.
    """
    with imported_for_good():
        from sbora_diffusion.cli.bake import bake_concepts
        from sbora_diffusion.library.library import Library

        hide_loading_bars()
    factors = parse_numbers(strengths, len(names))
    library = Library(ADAPTERS)
    typer.echo(bake_concepts(names, factors, base, out, library=library, pipelines=PIPELINES, force=force))
