"""The command line: one file per command in this folder, registered here.

stdout is data: tables, and the paths of what was written. Logs, progress and errors go to stderr. The commands import
torch and everything on it only when they run, so that --help is quick.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sbora_diffusion import __version__
from sbora_diffusion.cli import llm
from sbora_diffusion.cli.bake import bake
from sbora_diffusion.cli.compare import compare
from sbora_diffusion.cli.console import collect_garbage_less, one_line_errors, set_up_logging, share_cores
from sbora_diffusion.cli.eval import evaluate
from sbora_diffusion.cli.export import export
from sbora_diffusion.cli.generate import generate
from sbora_diffusion.cli.import_ import import_
from sbora_diffusion.cli.inspect import inspect
from sbora_diffusion.cli.ledger import ledger
from sbora_diffusion.cli.merge import merge
from sbora_diffusion.cli.remove import remove
from sbora_diffusion.cli.train import train
from sbora_diffusion.cli.ui import ui


class Commands(TyperGroup):
    """The commands, with errors that the user can act on in one line."""

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback(invoke_without_command=True)
def commands(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Teach a diffusion model concepts from a handful of images; combine and remove them exactly."""
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
app.add_typer(llm.app, name="llm")


def main() -> None:
    """Run the command line."""
    share_cores()
    collect_garbage_less()
    app()
