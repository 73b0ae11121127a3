"""`sbora-diffusion llm chat`: a conversation in the terminal."""

import sys
from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_bars_of_transformers
from sbora_diffusion.cli.llm.options import Adapters, Base, Quantize
from sbora_diffusion.utils.errors import SboraError


def chat(
    base: Base,
    adapter: Adapters = [],  # noqa: B006
    quantize: Quantize = "none",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Chat in the terminal; /adapter NAME switches adapters, /help lists the commands."""
    from rich.console import Console

    from sbora_diffusion.llm.chat import load_chat

    hide_bars_of_transformers()
    screen = Console(stderr=True, highlight=False)
    conversation = load_chat(base, adapter, quantize, max_tokens, temperature)
    screen.print(f"with {conversation.active}; /help lists the commands")
    screen.print("> ", end="")
    for line in map(str.strip, sys.stdin):
        if line == "/quit":
            break
        try:
            if line.startswith("/"):
                screen.print(conversation.command(line))
            elif line:
                conversation.say(line, _write)
                _write("\n")
        except SboraError as error:
            screen.print(f"error: {error}")
        screen.print("> ", end="")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
