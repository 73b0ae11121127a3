"""`sbora-diffusion inspect`: what concept files contain, and what their sum guarantees."""

import logging
from typing import Annotated

import typer

from sbora_diffusion.cli.options import ADAPTERS
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)


def inspect(files: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Concept files.")]) -> None:
    """Show what concept files contain, and for several of them what their sum guarantees."""
    from sbora_diffusion.adapters.certificate import certify
    from sbora_diffusion.cli.render import adapter_details, adapter_table, certificate_table, show
    from sbora_diffusion.library.library import Library

    library = Library(ADAPTERS)
    paths = [library.locate(file) for file in files]
    adapters = [library.load(file) for file in files]
    if len(adapters) == 1:
        show(adapter_details(paths[0], adapters[0]))
        return
    show(adapter_table(paths, adapters))
    try:
        spec = adapters[0].spec
        certificate = certify(adapters, library.widths(spec.base_fingerprint, spec.side))
    except SboraError as error:
        log.warning("cannot be merged: %s. %s", error, error.hint)
        return
    show("")
    show(certificate_table(certificate))
