"""`sbora-diffusion remove`: delete a concept's file or reservation."""

import logging
from typing import Annotated

import typer

from sbora_diffusion.cli.options import ADAPTERS
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)


def remove(
    name: Annotated[str, typer.Argument(help="A concept in ./adapters.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask for confirmation.")] = False,
) -> None:
    """Delete a concept's file or reservation, which frees its columns unless a merge contains them."""
    from sbora_diffusion.library.library import Library

    library = Library(ADAPTERS)
    what = library.what_is(name)
    if not yes and not typer.confirm(f"Delete {what}?", err=True):
        raise SboraError("nothing was deleted")
    if also := library.remove(name):
        log.info("its columns are not free: %s has them, too", ", ".join(also))
