"""Options that several llm commands share."""

from typing import Annotated

import typer

Base = Annotated[str, typer.Option(metavar="ID", help="A folder, also with a single GGUF file, or a hub id.")]
Quantize = Annotated[str, typer.Option(metavar="NAME", help="nf4: the base model in 4 bits, as in QLoRA; or none.")]
Adapters = Annotated[
    list[str], typer.Option("--adapter", metavar="DIR|FILE", help="A run, PEFT directory or concept file; repeatable.")
]
Adapter = Annotated[str, typer.Argument(metavar="DIR|FILE", help="A run, PEFT directory or concept file.")]
