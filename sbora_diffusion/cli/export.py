"""`sbora-diffusion export`: a concept as files that other programs load."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import ADAPTERS, EXPORTS, AdapterBase, Force, hide_loading_bars

log = logging.getLogger(__name__)

NEXT = {
    "diffusers": 'pipeline.load_lora_weights("{folder}"), and the tokens in its embeddings/',
    "kohya": "put the file into ComfyUI's models/loras, and embeddings/ into models/embeddings",
    "peft": 'PeftModel.from_pretrained(pipeline.{denoiser}, "{folder}/{denoiser}"), and the tokens in its embeddings/',
}


def export(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A concept, or a merge of several.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="diffusers, kohya (ComfyUI, A1111, Forge) or peft.")],
    base: AdapterBase = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: exports/NAME-FORMAT.")] = None,
    force: Force = False,
) -> None:
    """Write a concept as an ordinary LoRA and its learned tokens, for other programs."""
    from sbora_diffusion.inference.generate import check_base
    from sbora_diffusion.interchange.exporting import export as export_adapter
    from sbora_diffusion.library.library import Library
    from sbora_diffusion.models.base import load_base

    hide_loading_bars()
    adapter = Library(ADAPTERS).load(name)
    model = load_base(base or adapter.spec.base_id)
    check_base(adapter, model)
    paths = export_adapter(
        adapter,
        model.layer_shapes,
        to,
        folder := out or EXPORTS / f"{adapter.spec.name}-{to}",
        resolution=model.resolution,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        force=force,
    )
    log.info("next: %s; see docs/interchange.md", NEXT[to].format(folder=folder, denoiser=model.family.denoiser))
    for path in paths:
        typer.echo(path)
