"""The llm commands: language models on the same adapter core. What is heavy is imported inside the commands."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    RUNS,
    hide_bars_of_transformers,
    imported_for_good,
    parse_numbers,
    parse_settings,
)

log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Fine-tune, measure, merge and try language models."
)

Base = Annotated[str, typer.Option(metavar="ID", help="A folder (also of one GGUF file), or a hub id.")]
Quantize = Annotated[str, typer.Option(metavar="NAME", help="nf4: the base in 4 bits, as QLoRA has it; or none.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]
Adapters = Annotated[
    list[str], typer.Option("--adapter", metavar="DIR|FILE", help="A run, a PEFT directory or a concept file.")
]


@app.command()
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
    interval: Annotated[str, typer.Option(metavar="A:B", help="Pin the columns, instead of the first free.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/llm-DATA-METHOD.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the parameters, without weights.")] = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Fine-tune: writes a PEFT directory and, of SBoRA, a concept file: adapters/DIR.safetensors, whose columns nobody
    else is given. --set takes every setting: docs/llm.md. Also under torchrun and accelerate."""
    from sbora_diffusion.llm.config import LlmConfig

    config = LlmConfig.from_recipe(recipe, parse_settings(settings))
    if dry_run:
        from sbora_diffusion.llm.base import count_parameters

        trained, total = count_parameters(base, method, config)
        typer.echo(f"{method}\t{trained:,} trained\t{total:,} in the base model\t{trained / total:.3%}")
        return
    if data is None:
        raise typer.BadParameter("is needed, such as records.json", param_hint="--data")
    with imported_for_good():
        from sbora_diffusion.adapters.basis import Interval
        from sbora_diffusion.cli.llm_run import fine_tune
        from sbora_diffusion.library.library import Library
        from sbora_diffusion.llm.run_folder import Run

        hide_bars_of_transformers()
    folder = out or RUNS / f"llm-{data.stem}-{method}"
    pinned = Interval.parse(interval) if interval else None
    run = Run(base=base, data=data, method=method, quantize=quantize, interval=pinned)
    for path in fine_tune(run, config, folder, Library(ADAPTERS), resume=resume):
        typer.echo(path)


@app.command("eval")
def evaluate(
    base: Base,
    tasks: Annotated[str, typer.Option(metavar="NAME,…", help="Such as adapters_commonsense, qlora_mmlu, arc_easy.")],
    adapter: Adapters = [],  # noqa: B006
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="LLM-Adapters' layout: DIR/TASK/test.json.")] = None,
    quantize: Quantize = "none",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first questions of a task.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the numbers go, as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Measure by lm-evaluation-harness; runs that differ only in their seed become one row, with an interval.

    --set takes batch_size (8) and dtype (float32, bfloat16, float16).
    """
    with imported_for_good():
        from sbora_diffusion.cli.llm_run import measure

        hide_bars_of_transformers()
    options = parse_settings(settings)
    measure(base, tasks, adapter, data, quantize, limit, out, options, force=force, tell=typer.echo)


@app.command()
def merge(
    files: Annotated[list[str], typer.Argument(metavar="DIR|FILE...", help="SBoRA runs or concept files of one base.")],
    weights: Annotated[str, typer.Option(metavar="W,W,…", help="One factor for each, 1 for all by default.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME+NAME.safetensors.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what exists.")] = False,
) -> None:
    """Add SBoRA adapters up into one concept file, the same whatever their order; disjoint ones do not touch."""
    with imported_for_good():
        from sbora_diffusion.cli.llm_run import merge_files

    typer.echo(merge_files(files, parse_numbers(weights, len(files)), out, force=force))


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(metavar="DIR|FILE", help="A run, a PEFT directory or a concept file.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="peft (vLLM, SGLang, llama.cpp) or model (merged).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A folder that does not exist yet.")],
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what it was trained for.")] = "",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge what was trained on nf4 into a dequantised copy of its base.")
    ] = False,
) -> None:
    """Write an adapter as a plain LoRA, or the whole model with it merged in."""
    with imported_for_good():
        from sbora_diffusion.cli.llm_run import export_adapter

        hide_bars_of_transformers()
    typer.echo(export_adapter(adapter, to, out, base, dequantize=dequantize))


@app.command()
def chat(
    base: Base,
    adapter: Adapters = [],  # noqa: B006
    quantize: Quantize = "none",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to it in the terminal; /adapter NAME switches at once, /help says what else."""
    with imported_for_good():
        from sbora_diffusion.cli.llm_run import talk

        hide_bars_of_transformers()
    talk(base, adapter, quantize, max_tokens, temperature)
