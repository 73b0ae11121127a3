"""`sbora-diffusion llm export`: an adapter for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_bars_of_transformers
from sbora_diffusion.cli.llm.options import Adapter


def export(
    adapter: Adapter,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="peft (vLLM, SGLang, llama.cpp) or model (merged).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A folder that does not exist yet.")],
    base: Annotated[str, typer.Option(metavar="ID", help="Default: the base model it was trained on.")] = "",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge an adapter trained on nf4 into its dequantised base model.")
    ] = False,
) -> None:
    """Write an adapter as a plain LoRA, or the whole model with the adapter merged in."""
    from sbora_diffusion.llm.adapters import export as export_adapter

    hide_bars_of_transformers()
    typer.echo(export_adapter(adapter, to, out, base, dequantize))
