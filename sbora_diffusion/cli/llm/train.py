"""`sbora-diffusion llm train`: fine-tune a language model."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import ADAPTERS, RUNS, hide_bars_of_transformers, parse_settings
from sbora_diffusion.cli.llm.options import Base, Quantize
from sbora_diffusion.cli.options import Settings

log = logging.getLogger(__name__)


def train(
    base: Base,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON, JSONL or Parquet: instruction, output; or messages.")
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="sbora-fa, sbora-fb, lora or dora.")] = "sbora-fa",
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="commonsense, arithmetic, qsbora (published) or small.")
    ] = "small",
    quantize: Quantize = "none",
    interval: Annotated[str, typer.Option(metavar="A:B", help="Columns to train; default: the first free.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/llm-DATA-METHOD.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted training.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count parameters; needs no weights.")] = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Fine-tune; write a PEFT directory and, for SBoRA, a concept file adapters/DIR.safetensors that owns its columns.

    All settings for --set are listed in docs/llm.md. Also runs under torchrun and accelerate.
    """
    from sbora_diffusion.llm.config import LlmConfig

    config = LlmConfig.from_recipe(recipe, parse_settings(settings))
    if dry_run:
        from sbora_diffusion.llm.base import count_parameters

        trained, total = count_parameters(base, method, config)
        typer.echo(f"{method}\t{trained:,} trained\t{total:,} in the base model\t{trained / total:.3%}")
        return
    if data is None:
        raise typer.BadParameter("is required, such as records.json", param_hint="--data")
    from sbora_diffusion.adapters.basis import Interval
    from sbora_diffusion.library.library import Library
    from sbora_diffusion.llm.run_folder import Run
    from sbora_diffusion.llm.train import train as fine_tune

    hide_bars_of_transformers()
    folder, pinned = out or RUNS / f"llm-{data.stem}-{method}", Interval.parse(interval) if interval else None
    run = Run(base=base, data=data, method=method, quantize=quantize, interval=pinned)
    with _progress_bar() as on_step:
        result = fine_tune(run, config, folder, resume, on_step, Library(ADAPTERS))
    if result:  # None in the other processes of several
        log.info("next: sbora-diffusion llm chat --base %s --adapter %s", base, folder)
        for path in filter(None, (result.adapter, result.in_library)):
            typer.echo(path)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=None)
        yield lambda step, steps, loss: progress.update(
            bar, completed=step, total=steps, description=f"loss {loss:.3f}"
        )
