"""The llm commands: language models on the same adapter core."""

import typer

from sbora_diffusion.cli.llm.chat import chat
from sbora_diffusion.cli.llm.eval import evaluate
from sbora_diffusion.cli.llm.export import export
from sbora_diffusion.cli.llm.merge import merge
from sbora_diffusion.cli.llm.train import train

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Fine-tune, evaluate and merge language models.")
for command in (train, merge, export, chat):
    app.command()(command)
app.command("eval")(evaluate)
