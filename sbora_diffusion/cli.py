"""The command line: thin, and quick to answer, for torch and everything on it is imported inside the commands.

stdout is data: tables, and the paths of what was written. Logs, progress and errors go to stderr.
"""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sbora_diffusion import __version__, cli_llm
from sbora_diffusion.console import (
    ADAPTERS,
    RUNS,
    convert,
    flag,
    hide_loading_bars,
    parse_numbers,
    parse_settings,
    set_up_logging,
    share_cores,
    told_in_a_line,
)
from sbora_diffusion.errors import SboraError

log = logging.getLogger(__name__)

EVALUATIONS, EXPORTS = Path("evaluations"), Path("exports")
PIPELINES = Path("pipelines")  # what is baked
FUSED = """guaranteed: only the concepts' own columns or rows are written; the same file, to the bit, in any order;
taken out as a whole, to the bit. Not guaranteed: pictures; measure them: sbora-diffusion eval"""


class Commands(TyperGroup):
    """Tells users what they can do something about."""

    def invoke(self, ctx: Any) -> Any:
        with told_in_a_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)

app.add_typer(cli_llm.app, name="llm")

Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
Base = Annotated[
    str,
    typer.Option(metavar="ID", help="emoji64, sd15, sd21, sdxl, sd3, flux, a folder, a checkpoint file or a hub id."),
]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]
Numbers = Annotated[str, typer.Option(metavar="W,W,…", help="One factor for each adapter, 1 for all by default.")]


@app.callback(invoke_without_command=True)
def commands(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Teach a diffusion model concepts from a handful of pictures; put them together or take them out exactly."""
    if version:
        typer.echo(f"sbora-diffusion {__version__}")
        raise typer.Exit
    set_up_logging()


@app.command()
def train(
    concept: Annotated[
        list[str], typer.Option(metavar="NAME|DIR", help="A concept that ships, or a folder of pictures; repeatable.")
    ],
    base: Base = "emoji64",
    method: Annotated[
        str, typer.Option(metavar="NAME", help="Such as sbora-fa, sbora-fb, lora: docs/methods.md.")
    ] = "sbora-fa",
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Columns or rows a layer; default: the recipe's.")
    ] = None,
    interval: Annotated[str, typer.Option(metavar="A:B", help="Pin the columns, instead of the first free.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    force: Force = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Learn a concept: writes adapters/NAME.safetensors.

    Several are learned in a process each, with columns reserved for all at the start; the same command goes on where it
    was stopped. --set jobs=2 runs two at a time, --set cluster=1 runs them on a Ray cluster.
    """
    from sbora_diffusion.library import Library

    hide_loading_bars()
    overrides = parse_settings(settings) | ({} if rank is None else {"rank": str(rank)})
    library = Library(ADAPTERS)
    if len(concept) > 1:
        from sbora_diffusion.cli_fan_out import fan_out

        if interval:
            raise typer.BadParameter("several concepts cannot have one interval", param_hint="--interval")
        own = {key: overrides.pop(key) for key in ("jobs", "cluster") if key in overrides}
        how = convert({"jobs": "1", "cluster": "0"} | own, {"jobs": int, "cluster": int})
        paths = fan_out(concept, base, method, overrides, library=library, runs=RUNS, force=force, **how)
    else:
        from sbora_diffusion.cli_train import train_concept

        paths = train_concept(
            concept[0], base, method, interval, overrides, library=library, runs=RUNS, resume=resume, force=force
        )
    for path in paths:
        typer.echo(path)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="For instance: a <dog> on the beach")],
    adapter: Annotated[list[str], typer.Option(metavar="NAME|FILE", help="A concept; repeatable.")] = [],  # noqa: B006
    strengths: Numbers = "",
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapters were trained for.")] = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path("outputs"),
    seed: Annotated[int, typer.Option(metavar="N", help="Of the first picture; the next has the next.")] = 0,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="How many pictures.")] = 1,
    region: Annotated[
        list[str],
        typer.Option(metavar="L,T,R,B[,NAME…]:PROMPT", help='A prompt for a part: "0,0,.5,1: a <dog>"; repeatable.'),
    ] = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
) -> None:
    """Make pictures, with any concepts. --set takes steps, guidance, negative_prompt, gated (1: each concept acts
    only where it is named), whole_scene (0: a region hears its own prompt only, nothing of the other ones), precision
    (fp32, bf16 or fp16; on a GPU SDXL, SD3 and FLUX are drawn in bf16)."""
    kinds = {"steps": int, "guidance": float, "negative_prompt": str, "gated": flag, "whole_scene": flag}
    kinds |= {"precision": str}
    options = convert(parse_settings(settings), kinds)
    from sbora_diffusion.cli_generate import pictures
    from sbora_diffusion.diffusion.picture_file import save_numbered
    from sbora_diffusion.library import Library

    hide_loading_bars()
    adapters = [Library(ADAPTERS).load(name) for name in adapter]
    factors, seeds = parse_numbers(strengths, len(adapters)), range(seed, seed + count)
    for picture, made in pictures(base, prompt, adapters, factors, seeds, region, options):
        typer.echo(save_numbered(picture, out, made))


@app.command()
def merge(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="What to put together.")],
    how: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="sum, or fuse: solve for what disturbs each concept least; or a method's own."
        ),
    ] = "",
    weights: Numbers = "",
    prior_weight: Annotated[
        float, typer.Option(metavar="NUMBER", help="Of fuse: how much it counts that all else stays as it was.")
    ] = 0.3,
    base: Annotated[str, typer.Option(metavar="ID", help="Of fuse; default: what the first was trained for.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: adapters/NAME+NAME.safetensors.")] = None,
    force: Force = False,
) -> None:
    """Put concepts together into one concept file."""
    from sbora_diffusion.adapter.certificate import certify
    from sbora_diffusion.adapter.merge import merge as merge_adapters
    from sbora_diffusion.adapter.merge import merged_name
    from sbora_diffusion.library import Library
    from sbora_diffusion.methods import merge_choice

    library = Library(ADAPTERS)
    adapters = [library.load(name) for name in names]
    how = merge_choice(adapters[0].spec.method_name, how)
    numbers = parse_numbers(weights, len(adapters))
    path = out or library.path(merged_name(adapters))
    if adapters[0].spec.method:
        from sbora_diffusion.cli_merge import merged_as_its_paper_does

        hide_loading_bars()
        merged = merged_as_its_paper_does(adapters, numbers if weights else None, how, base)
    elif how == "sum":
        merged = merge_adapters(adapters, numbers, how)
    else:
        from sbora_diffusion.cli_merge import fuse_drawn

        if path.exists() and not force:  # before minutes of work
            raise SboraError(f"{path} exists", hint="Choose another --out, or overwrite it with --force.")
        hide_loading_bars()
        merged = fuse_drawn(adapters, numbers, base, prior_weight)
    merged.save(path, force)
    spec = merged.spec
    widths = library.widths(spec.base_fingerprint, spec.side)
    if spec.method:
        log.info("merged by %s, as %s is; nothing is guaranteed", how, spec.method)
    else:
        log.info(certify(adapters, widths).describe() if how == "sum" else FUSED)
    log.info('next: sbora-diffusion generate "%s" --adapter %s', " and ".join(spec.tokens), path)
    typer.echo(path)


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A concept, or a merge of several.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="diffusers, kohya (ComfyUI, A1111, Forge) or peft.")],
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapter was trained for.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: exports/NAME-FORMAT.")] = None,
    force: Force = False,
) -> None:
    """Write a concept as files that other programs load: an ordinary LoRA, and its learned tokens."""
    from sbora_diffusion.cli_exchange import export_concept
    from sbora_diffusion.library import Library

    hide_loading_bars()
    for path in export_concept(name, to, base, library=Library(ADAPTERS), exports=EXPORTS, out=out, force=force):
        typer.echo(path)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A LoRA file, a PEFT folder, or a concept file.")],
    embedding: Annotated[list[Path], typer.Option(metavar="FILE", help="A learned token; repeatable.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the concept; default: what the file says.")] = "",
    noun: Annotated[str, typer.Option(metavar="WORD", help="Class of tokens whose files do not say it.")] = "",
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the file says.")] = "",
    collision: Annotated[
        str, typer.Option(metavar="refuse|keep", help="What if others in ./adapters own the same columns.")
    ] = "refuse",
    force: Force = False,
) -> None:
    """Take in a concept that was trained elsewhere, if it is an SBoRA adapter: writes adapters/NAME.safetensors."""
    from sbora_diffusion.cli_exchange import import_concept
    from sbora_diffusion.library import Library

    hide_loading_bars()
    library = Library(ADAPTERS)
    typer.echo(import_concept(path, embedding, name, noun, base, library=library, collision=collision, force=force))


@app.command()
def bake(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="What to write into the weights.")],
    strengths: Numbers = "",
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapters were trained for.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: pipelines/NAME+NAME.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a pipeline that was baked before.")] = False,
) -> None:
    """Write a whole pipeline folder with concepts in it, for any program that loads diffusers' format.

    Takes what `merge` cannot: columns with rows, several seeds.
    """
    from sbora_diffusion.cli_bake import bake_concepts
    from sbora_diffusion.library import Library

    hide_loading_bars()
    factors = parse_numbers(strengths, len(names))
    library = Library(ADAPTERS)
    typer.echo(bake_concepts(names, factors, base, out, library=library, pipelines=PIPELINES, force=force))


@app.command("eval")
def evaluate(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Trained concepts.")],
    merged: Annotated[str, typer.Option(metavar="NAME|FILE", help="A merge of them, to compare with.")] = "",
    suite: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The prompts; default: emoji64 or objects, by the base.")
    ] = "",
    encoder: Annotated[
        str,
        typer.Option(metavar="ID", help="The judge: emoji-clip, a CLIP's folder or hub id, open_clip:NAME/WEIGHTS."),
    ] = "",
    concept: Annotated[list[str], typer.Option(metavar="DIR", help="Pictures of a concept of yours.")] = [],  # noqa: B006
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapters were trained for.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: a folder in evaluations, by the names.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Throw away another evaluation's pictures in --out.")] = False,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Score how well concepts do what prompts say, alone and merged; run again, it goes on where it was.

    Settings: seeds (pictures a prompt), steps, guidance, negative_prompt, batch_size, vision (a second judge).
    """
    kinds = {"seeds": int, "steps": int, "guidance": float, "negative_prompt": str, "batch_size": int, "vision": str}
    options = convert(parse_settings(settings), kinds)
    from sbora_diffusion.cli_eval import evaluate_concepts
    from sbora_diffusion.library import Library

    hide_loading_bars()
    table, paths = evaluate_concepts(
        names,
        merged,
        suite,
        encoder,
        concept,
        base,
        options,
        library=Library(ADAPTERS),
        evaluations=EVALUATIONS,
        out=out,
        force=force,
    )
    typer.echo(f"{table}\n")
    for path in paths:
        typer.echo(path)


@app.command()
def compare(
    methods: Annotated[str, typer.Option(metavar="NAME …", help="Such as: sbora-fa lora lora:rank=4,steps=200")],
    concepts: Annotated[str, typer.Option(metavar="NAME …", help="Concepts that ship, or of ./concepts.")],
    merge: Annotated[str, typer.Option(metavar="K,…", help="How many are merged at once; 1 is each alone.")] = "1",
    seeds: Annotated[str, typer.Option(metavar="N,…", help="Of trainings and pictures.")] = "0,1,2",
    base: Base = "emoji64",
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Cells at once.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where all cells lie; what is there is kept.")] = Path(
        "comparison"
    ),
    settings: Settings = [],  # noqa: B006
) -> None:
    """Train and judge concepts by several methods: a table, and plots beside it; run again, it goes on.

    --set is for all recipes (steps=200), besides suite and encoder; a learning rate sweep is a method several times.
    """
    try:
        sizes, numbers = (tuple(int(part) for part in text.split(",")) for text in (merge, seeds))
    except ValueError:
        raise typer.BadParameter(f"got {merge} and {seeds}, expected whole numbers") from None
    from sbora_diffusion.cli_compare import compare_methods
    from sbora_diffusion.evaluation.compare_cells import Comparison

    shared = parse_settings(settings)
    judged = {"suite": shared.pop("suite", "emoji64"), "judge": shared.pop("encoder", "emoji-clip")}
    comparison = Comparison(
        variants=tuple(methods.split()),
        concepts=tuple(concepts.split()),
        seeds=numbers,
        sizes=sizes,
        base=base,
        settings=shared,
        **judged,
    )
    typer.echo(compare_methods(comparison, out, jobs))


@app.command()
def inspect(files: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Concept files.")]) -> None:
    """Show what concept files hold, and for several what their sum guarantees."""
    from sbora_diffusion.adapter.certificate import certify
    from sbora_diffusion.cli_render import adapter_details, adapter_table, certificate_table, show
    from sbora_diffusion.library import Library

    library = Library(ADAPTERS)
    paths = [library.locate(file) for file in files]
    adapters = [library.load(file) for file in files]
    if len(adapters) == 1:
        show(adapter_details(paths[0], adapters[0]))
        return
    show(adapter_table(paths, adapters))
    try:
        spec = adapters[0].spec
        certificate = certify(adapters, library.widths(spec.base_fingerprint, spec.side))
    except SboraError as reason:
        log.warning("cannot be merged: %s. %s", reason, reason.hint)
        return
    show("")
    show(certificate_table(certificate))


@app.command()
def ledger(
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Count the room in this rank, or reserve as many.")] = 8,
    reserve: Annotated[str, typer.Option(metavar="NAME", help="Keep an interval for a concept to come.")] = "",
    interval: Annotated[str, typer.Option(metavar="A:B", help="Which; default: the first free.")] = "",
    base: Base = "emoji64",
    method: Annotated[str, typer.Option(metavar="NAME", help="sbora-fa (columns) or sbora-fb (rows).")] = "sbora-fa",
) -> None:
    """Draw who owns which columns in ./adapters, and how much is free; --reserve keeps some without a training.

    A reservation lasts until the concept's file is there, or `remove NAME`. With --reserve the interval is printed.
    """
    from sbora_diffusion.library import Library

    library = Library(ADAPTERS)
    if reserve:
        from sbora_diffusion.cli_train import reserve_interval

        hide_loading_bars()
        typer.echo(reserve_interval(reserve, base, method, rank, interval, library=library))
        return
    if interval:
        raise typer.BadParameter("goes with --reserve NAME", param_hint="--interval")
    from sbora_diffusion.cli_render import ledger_bar, show

    ledgers = library.ledgers()
    if not ledgers:
        log.info("nothing in %s yet; next: sbora-diffusion train --concept dog", ADAPTERS)
    for entry in ledgers:
        show(ledger_bar(entry, rank))


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="A concept in ./adapters.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Delete a concept's file or reservation; its columns are free again."""
    from sbora_diffusion.library import Library

    library = Library(ADAPTERS)
    if not yes and not typer.confirm(f"Delete {library.path(name)}?", err=True):
        raise SboraError("nothing was deleted")
    library.remove(name)


@app.command()
def ui(
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Who can reach it; default: this machine.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(metavar="N", help="Default: the first free one from 7860 on.")] = None,
    base: Annotated[list[str], typer.Option(metavar="ID", help="A base model to choose; repeatable.")] = [],  # noqa: B006
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """The studio: a page in the browser to generate, train, merge and measure, in this folder."""
    hide_loading_bars()
    try:
        from sbora_diffusion.ui import open_studio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise SboraError("the studio needs gradio", hint='Install it: pip install "sbora-diffusion[ui]"') from None
    open_studio(host, port, base, open_browser=open_browser)


def main() -> None:
    """The console script."""
    share_cores()
    app()
