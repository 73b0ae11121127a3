"""`sbora-diffusion merge`: several concepts in one concept file."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    Floats,
    Force,
    ProgressBar,
    hide_loading_bars,
    parse_floats,
    prompt_of,
    suggest,
)
from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.adapters.file import Adapter
    from sbora_diffusion.library.library import Library

log = logging.getLogger(__name__)

MANY = 6  # concepts up to which a plain sum loses little (docs/results.md)
FUSED = """guaranteed: only the concepts' own columns or rows are written; the same file, to the bit, in any order;
removed as a whole, to the bit. Not guaranteed: images; measure them: sbora-diffusion eval"""


def merge(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="What to merge.")],
    how: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fuse: solve for the least disturbance of each concept (default where the base model is at hand); "
            "sum: exact, and each can be removed; or a method's own.",
        ),
    ] = "",
    weights: Floats = "",
    prior_weight: Annotated[
        float, typer.Option(metavar="NUMBER", help="For fuse: how strongly to preserve everything else.")
    ] = 0.3,
    base: Annotated[str, typer.Option(metavar="ID", help="To solve on; default: that of the first concept.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: adapters/NAME+NAME.safetensors.")] = None,
    force: Force = False,
) -> None:
    """Merge concepts into one concept file."""
    import sbora_diffusion as sbora
    from sbora_diffusion.adapters.merge import merged_name
    from sbora_diffusion.library.library import Library, load_adapters

    if len(names) < 2:
        raise SboraError(f"got only {names[0]}, expected two concepts or more")
    library = Library(ADAPTERS)
    adapters = load_adapters(names, library)
    path = out or library.path(merged_name(adapters))
    if path.exists() and not force:  # before minutes of work
        raise SboraError(f"{path} exists", hint="Choose another --out, or overwrite it with --force.")
    if how != "sum" or adapters[0].spec.method:
        hide_loading_bars()
    with ProgressBar() as progress:
        show = partial(progress.update, description="sampling what to preserve")
        merged = sbora.merge(adapters, parse_floats(weights), how, base or None, prior_weight, show)
    merged.save(path, force)
    _log_guarantees(merged, adapters, library)
    suggest("generate", prompt_of(merged.spec.tokens), "--adapter", path)
    typer.echo(path)


def _log_guarantees(merged: "Adapter", adapters: Sequence["Adapter"], library: "Library") -> None:
    from sbora_diffusion.adapters.certificate import certify

    spec = merged.spec
    how = spec.recipe["how"]
    if spec.method:
        log.info("merged by %s, as %s is; nothing is guaranteed", how, spec.method)
    elif how == "fuse":
        log.info(FUSED)
    else:
        log.info(certify(adapters, library.widths(spec.base_fingerprint, spec.side)).describe())
        if len(spec.parents) > MANY:
            log.info("a plain sum of %d concepts loses more of them than --how fuse does", len(spec.parents))
