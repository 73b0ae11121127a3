"""`sbora-diffusion llm eval`: accuracies on tasks."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_bars_of_transformers, parse_settings
from sbora_diffusion.cli.llm.options import Adapters, Base, Quantize
from sbora_diffusion.cli.options import Settings


def evaluate(
    base: Base,
    tasks: Annotated[str, typer.Option(metavar="NAME,…", help="Such as adapters_commonsense, qlora_mmlu, arc_easy.")],
    adapter: Adapters = [],  # noqa: B006
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="LLM-Adapters' layout: DIR/TASK/test.json.")] = None,
    quantize: Quantize = "none",
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of questions per task.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for all results.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Evaluate with lm-evaluation-harness; runs that differ only in their seed form one row, with an interval.

    --set takes batch_size (8) and dtype (float32, bfloat16, float16).
    """
    from sbora_diffusion.evaluation.llm_accuracy import accuracy_table, check_new, measure, write_results
    from sbora_diffusion.llm.evaluate import EvalConfig, Harness

    hide_bars_of_transformers()
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
