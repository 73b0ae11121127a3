"""The command line: a table of commands, whose files in this folder are imported when they run.

stdout is data: tables, and the paths of what was written. Logs, progress and errors go to stderr. The commands import
torch and everything on it only when they run, so that --help is quick.
"""

from importlib import import_module
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from sbora_diffusion import __version__
from sbora_diffusion.cli.console import collect_garbage_less, one_line_errors, set_up_logging, share_cores

OPTIONS: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}


class LazyCommands(TyperGroup):
    """A group that imports a command's module when the command runs."""

    table: ClassVar[dict[str, tuple[str, str]]]  # command -> module of this folder and function, one line of help

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=text) for name, (_, text) in self.table.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, self.load(name) if name else None, rest

    def load(self, name: str) -> Any:
        """Import a command."""
        module, function = self.table[name][0].split(":")
        command = getattr(import_module(f"sbora_diffusion.cli.{module}"), function)
        if not isinstance(command, typer.Typer):
            single = typer.Typer(**OPTIONS)
            single.command(name)(command)
            command = single
        return typer.main.get_command(command)


class Commands(LazyCommands):
    """The commands, with errors that the user can act on in one line."""

    table: ClassVar = {
        "train": ("train:train", "Train a concept: writes adapters/NAME.safetensors."),
        "generate": ("generate:generate", "Generate images, with any concepts."),
        "merge": ("merge:merge", "Merge concepts into one concept file."),
        "export": ("export:export", "Write a concept as an ordinary LoRA, for other programs."),
        "import": ("import_:import_", "Import a concept that was trained elsewhere."),
        "bake": ("bake:bake", "Write a whole pipeline folder with concepts in it."),
        "eval": ("eval:evaluate", "Score concepts, by themselves and merged."),
        "compare": ("compare:compare", "Train and score concepts by several methods."),
        "inspect": ("files:inspect", "Show what concept files contain."),
        "ledger": ("files:ledger", "Show who owns which columns, or reserve some."),
        "remove": ("files:remove", "Delete a concept's file or reservation."),
        "ui": ("ui:ui", "Open the studio, a web page in your browser."),
        "llm": ("llm:app", "Fine-tune, evaluate and merge language models."),
    }

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(cls=Commands, no_args_is_help=True, **OPTIONS)


@app.callback(invoke_without_command=True)
def commands(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Teach a diffusion model concepts from a handful of images; combine and remove them exactly."""
    if version:
        typer.echo(f"sbora-diffusion {__version__}")
        raise typer.Exit
    set_up_logging()


def main() -> None:
    """Run the command line."""
    share_cores()
    collect_garbage_less()
    app()
