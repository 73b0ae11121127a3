"""The command line: thin, and quick to answer, for torch and everything on it is imported inside the commands.

stdout is data: tables, and the paths of what was written. Logs, progress and errors go to stderr.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sbora_diffusion import __version__
from sbora_diffusion.cli import llm as cli_llm
from sbora_diffusion.cli.console import set_up_logging, share_cores, told_in_a_line
from sbora_diffusion.cli.exchange import bake, export, import_
from sbora_diffusion.cli.keeping import inspect, ledger, remove
from sbora_diffusion.cli.making import generate, merge
from sbora_diffusion.cli.measuring import compare, evaluate
from sbora_diffusion.cli.studio import ui
from sbora_diffusion.cli.train import train


class Commands(TyperGroup):
    """Tells users what they can do something about."""

    def invoke(self, ctx: Any) -> Any:
        with told_in_a_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback(invoke_without_command=True)
def commands(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Teach a diffusion model concepts from a handful of images; put them together or take them out exactly."""
    if version:
        typer.echo(f"sbora-diffusion {__version__}")
        raise typer.Exit
    set_up_logging()


for command in (train, generate, merge, export):
    app.command()(command)
app.command("import")(import_)
app.command()(bake)
app.command("eval")(evaluate)
for command in (compare, inspect, ledger, remove, ui):
    app.command()(command)
app.add_typer(cli_llm.app, name="llm")


def main() -> None:
    """The console script."""
    share_cores()
    app()
