"""What several commands are asked in the same words, and the folders they write to."""

from pathlib import Path
from typing import Annotated

import typer

EVALUATIONS, EXPORTS = Path("evaluations"), Path("exports")
PIPELINES = Path("pipelines")  # what is baked

Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Base = Annotated[
    str,
    typer.Option(metavar="ID", help="emoji64, sd15, sd21, sdxl, sd3, flux, a folder, a checkpoint file or a hub id."),
]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]
Numbers = Annotated[
    str, typer.Option(metavar="W,W,…", help="One factor for each adapter; default: 1, or what the method has.")
]
