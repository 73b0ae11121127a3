"""`sbora-diffusion inspect`, `ledger` and `remove`: what is in concept files and in a folder of them."""

import logging
from typing import Annotated

import typer

from sbora_diffusion.cli.console import ADAPTERS, Base, hide_loading_bars
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


def ledger(
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Rank to count the free room in, or to reserve.")] = 8,
    reserve: Annotated[str, typer.Option(metavar="NAME", help="Reserve an interval for a future concept.")] = "",
    release: Annotated[str, typer.Option(metavar="NAME", help="End a reservation; a concept's file stays.")] = "",
    interval: Annotated[str, typer.Option(metavar="A:B", help="Interval to reserve; default: the first free.")] = "",
    base: Base = "emoji64",
    method: Annotated[str, typer.Option(metavar="NAME", help="sbora-fa (columns) or sbora-fb (rows).")] = "sbora-fa",
) -> None:
    """Show who owns which columns in ./adapters and how many are free; --reserve takes some without training.

    A reservation lasts until the concept's file exists, or until --release. --reserve prints the interval.
    """
    from sbora_diffusion.library.library import Library

    library = Library(ADAPTERS)
    if release:
        library.cancel(release)
        log.info("the columns reserved for %s are free", release)
        return
    if reserve:
        from sbora_diffusion.training.train import reserve_interval

        hide_loading_bars()
        typer.echo(reserve_interval(reserve, base, method, rank, interval, library=library))
        return
    if interval:
        raise typer.BadParameter("goes with --reserve NAME", param_hint="--interval")
    from sbora_diffusion.cli.render import ledger_bar, show

    ledgers = library.ledgers()
    if not ledgers:
        log.info("no adapters in %s yet; next: sbora-diffusion train --concept dog", ADAPTERS)
    for entry in ledgers:
        show(ledger_bar(entry, rank))


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
