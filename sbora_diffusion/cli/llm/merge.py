"""`sbora-diffusion llm merge`: the sum of SBoRA adapters."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import parse_numbers
from sbora_diffusion.cli.options import Force

log = logging.getLogger(__name__)


def merge(
    files: Annotated[list[str], typer.Argument(metavar="DIR|FILE...", help="SBoRA runs or concept files of one base.")],
    weights: Annotated[str, typer.Option(metavar="W,W,…", help="One factor per adapter; default: 1.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME+NAME.safetensors.")] = None,
    force: Force = False,
) -> None:
    """Sum SBoRA adapters into one concept file, in any order; adapters with disjoint columns do not interfere."""
    from sbora_diffusion.adapters.certificate import certify
    from sbora_diffusion.adapters.merge import merge as merge_adapters
    from sbora_diffusion.adapters.merge import merged_name
    from sbora_diffusion.llm.adapters import read_concept

    adapters = [read_concept(file) for file in files]
    path = out or Path(f"{merged_name(adapters)}.safetensors")
    merge_adapters(adapters, parse_numbers(weights, len(files)), "sum").save(path, force)
    log.info(certify(adapters, None).describe())
    log.info("next: sbora-diffusion llm export %s --to peft --out DIR", path)
    typer.echo(path)
