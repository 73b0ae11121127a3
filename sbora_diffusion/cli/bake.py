"""`sbora-diffusion bake`: a whole pipeline folder with concepts written into it."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    PIPELINES,
    AdapterBase,
    Floats,
    hide_loading_bars,
    parse_floats,
    prompt_of,
    suggest,
)

log = logging.getLogger(__name__)


def bake(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="What to write into the weights.")],
    strengths: Floats = "",
    base: AdapterBase = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: pipelines/NAME+NAME.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a pipeline that was baked before.")] = False,
) -> None:
    """Write a whole pipeline folder with concepts in it, for any program that loads diffusers' format.

    Accepts what `merge` cannot combine: columns with rows, several seeds.
    """
    from sbora_diffusion.inference.bake import bake as bake_adapters
    from sbora_diffusion.library.library import load_adapters
    from sbora_diffusion.models.base import load_base
    from sbora_diffusion.utils.text import joined_names

    hide_loading_bars()
    adapters = load_adapters(names, ADAPTERS)
    folder = out or PIPELINES / joined_names(adapter.spec.name for adapter in adapters)
    factors = parse_floats(strengths) or [1.0] * len(adapters)
    tokens = bake_adapters(load_base(base or adapters[0].spec.base_id), adapters, factors, folder, force)
    suggest("generate", prompt_of(tokens), "--base", folder)
    log.info('or, in Python: DiffusionPipeline.from_pretrained("%s", safety_checker=None)', folder)
    typer.echo(folder)
