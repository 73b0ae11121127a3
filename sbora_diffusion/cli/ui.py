"""`sbora-diffusion ui`: open the studio."""

from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_loading_bars
from sbora_diffusion.utils.errors import SboraError


def ui(
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; default: this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(metavar="N", help="Default: the first free one from 7860 on.")] = None,
    base: Annotated[list[str], typer.Option(metavar="ID", help="A base model to offer; repeatable.")] = [],  # noqa: B006
    auth: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="SBORA_AUTH", help="Required where other machines can reach it."),
    ] = None,
    name: Annotated[
        list[str], typer.Option(metavar="NAME", help="A further host name it is reached by, as of a proxy; repeatable.")
    ] = [],  # noqa: B006
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Open the studio, a web page to generate, train, merge and evaluate in this folder."""
    try:
        hide_loading_bars()
        from sbora_diffusion.studio.app import open_studio
        from sbora_diffusion.studio.door import Door, parse_auth
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise SboraError("the studio needs gradio", hint='Install it: pip install "sbora-diffusion[ui]"') from None
    door = Door(host=host, names=tuple(map(str.lower, name)), auth=parse_auth(auth))
    open_studio(door, port, base, open_browser=open_browser)
