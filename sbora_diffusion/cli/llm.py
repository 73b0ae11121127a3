"""`sbora-diffusion llm`: language models on the same adapter core."""

import logging
import sys
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from sbora_diffusion.cli.app import OPTIONS, LazyCommands
from sbora_diffusion.cli.console import (
    ADAPTERS,
    RUNS,
    Force,
    ProgressBar,
    Settings,
    hide_loading_bars,
    parse_floats,
    parse_settings,
    suggest,
)
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

Base = Annotated[str, typer.Option(metavar="ID", help="A folder, also with a single GGUF file, or a hub id.")]
Quantize = Annotated[str, typer.Option(metavar="NAME", help="nf4: the base model in 4 bits, as in QLoRA; or none.")]
Adapters = Annotated[
    list[str], typer.Option("--adapter", metavar="DIR|FILE", help="A run, PEFT directory or concept file; repeatable.")
]
Adapter = Annotated[str, typer.Argument(metavar="DIR|FILE", help="A run, PEFT directory or concept file.")]


class LlmCommands(LazyCommands):
    """The commands on language models."""

    table: ClassVar = {
        "train": ("llm:train", "Fine-tune on instructions or conversations."),
        "merge": ("llm:merge", "Sum SBoRA adapters into one concept file."),
        "export": ("llm:export", "Write an adapter as a plain LoRA, or the whole model."),
        "chat": ("llm:chat", "Chat in the terminal."),
        "eval": ("llm:evaluate", "Evaluate with lm-evaluation-harness."),
    }


app = typer.Typer(cls=LlmCommands, no_args_is_help=True, **OPTIONS)


@app.callback()
def commands() -> None:
    """Fine-tune, evaluate and merge language models."""


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

    hide_loading_bars(diffusers=False)
    folder, pinned = out or RUNS / f"llm-{data.stem}-{method}", Interval.parse(interval) if interval else None
    run = Run(base=base, data=data, method=method, quantize=quantize, interval=pinned)
    with ProgressBar("training") as progress:

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(step, steps, f"loss {loss:.3f}", f"step {step}/{steps}  loss {loss:.3f}")

        result = fine_tune(run, config, folder, resume, show, Library(ADAPTERS))
    if result:  # None in the other processes of several
        suggest("llm", "chat", "--base", base, "--adapter", folder)
        for path in filter(None, (result.adapter, result.in_library)):
            typer.echo(path)


def merge(
    files: Annotated[list[str], typer.Argument(metavar="DIR|FILE...", help="SBoRA runs or concept files of one base.")],
    weights: Annotated[str, typer.Option(metavar="W,W,…", help="One factor per adapter; default: 1.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME+NAME.safetensors.")] = None,
    force: Force = False,
) -> None:
    """Sum SBoRA adapters into one concept file, in any order; adapters with disjoint columns do not interfere."""
    from sbora_diffusion.adapters.certificate import certify
    from sbora_diffusion.adapters.merge import merge as merge_adapters
    from sbora_diffusion.adapters.merge import merged_name
    from sbora_diffusion.llm.adapters import read_concept

    adapters = [read_concept(file) for file in files]
    path = out or Path(f"{merged_name(adapters)}.safetensors")
    merge_adapters(adapters, parse_floats(weights) or [1.0] * len(files), "sum").save(path, force)
    log.info(certify(adapters, None).describe())
    suggest("llm", "export", path, "--to", "peft", "--out", "DIR")
    typer.echo(path)


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

    hide_loading_bars(diffusers=False)
    typer.echo(export_adapter(adapter, to, out, base, dequantize))


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

    hide_loading_bars(diffusers=False)
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


def evaluate(
    base: Base,
    tasks: Annotated[str, typer.Option(metavar="NAME,…", help="Such as adapters_commonsense, qlora_mmlu, arc_easy.")],
    adapter: Adapters = [],  # noqa: B006
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="LLM-Adapters' layout: DIR/TASK/test.json.")] = None,
    quantize: Quantize = "none",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of questions per task.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for all results.")] = None,
    force: Force = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Evaluate with lm-evaluation-harness; runs that differ only in their seed form one row, with an interval.

    --set takes batch_size (8) and dtype (float32, bfloat16, float16).
    """
    from sbora_diffusion.evaluation.llm_accuracy import accuracy_table, check_new, measure, write_results
    from sbora_diffusion.llm.evaluate import EvalConfig, Harness

    hide_loading_bars(diffusers=False)
    if out:
        check_new(out, force)
    config, measured = EvalConfig.from_settings(parse_settings(settings)), []
    harness = Harness([task.strip() for task in tasks.split(",") if task.strip()], data)
    about = {"command": ["sbora-diffusion", *sys.argv[1:]], "base": base, "quantize": quantize, "limit": limit}
    try:  # what is measured is printed even if a later model fails
        for model in measure(base, adapter, harness, config, quantize, limit):
            measured.append(model)
            if out:
                write_results(out, about, config, measured)
    finally:
        if measured:
            typer.echo(accuracy_table(measured))
