"""`sbora-diffusion ledger`: who owns which columns, and reserving some."""

import logging
from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_loading_bars
from sbora_diffusion.cli.options import ADAPTERS, Base

log = logging.getLogger(__name__)


def ledger(
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Rank to count the free room in, or to reserve.")] = 8,
    reserve: Annotated[str, typer.Option(metavar="NAME", help="Reserve an interval for a future concept.")] = "",
    interval: Annotated[str, typer.Option(metavar="A:B", help="Interval to reserve; default: the first free.")] = "",
    base: Base = "emoji64",
    method: Annotated[str, typer.Option(metavar="NAME", help="sbora-fa (columns) or sbora-fb (rows).")] = "sbora-fa",
) -> None:
    """Show who owns which columns in ./adapters and how many are free; --reserve takes some without training.

    A reservation lasts until the concept's file exists, or until `remove NAME`. --reserve prints the interval.
    """
    from sbora_diffusion.library.library import Library

    library = Library(ADAPTERS)
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
