"""Commands that make concepts and images: train, generate, merge."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    RUNS,
    convert,
    flag,
    hide_loading_bars,
    imported_for_good,
    parse_numbers,
    parse_settings,
)
from sbora_diffusion.cli.options import Base, Force, Numbers, Settings
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

MANY = 6  # concepts of which a plain sum keeps nearly all (docs/results.md)
FUSED = """guaranteed: only the concepts' own columns or rows are written; the same file, to the bit, in any order;
taken out as a whole, to the bit. Not guaranteed: images; measure them: sbora-diffusion eval"""


def train(
    concept: Annotated[
        list[str], typer.Option(metavar="NAME|DIR", help="A concept that ships, or a folder of images; repeatable.")
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

    --set takes every setting, such as steps=400, recipe=loud or precision=bf16: docs/training.md has them all. Several
    concepts are learned in a process each, with columns reserved for all at the start; the same command goes on where
    it was stopped. --set jobs=2 runs two at a time, --set cluster=1 runs them on a Ray cluster.
    """
    with imported_for_good():
        from sbora_diffusion.cli.train import Request, train_concept
        from sbora_diffusion.library.library import Library

        hide_loading_bars()
    overrides = parse_settings(settings) | ({} if rank is None else {"rank": str(rank)})
    library = Library(ADAPTERS)
    if len(concept) > 1:
        from sbora_diffusion.training.fan_out import fan_out

        if interval:
            raise typer.BadParameter("several concepts cannot have one interval", param_hint="--interval")
        own = {key: overrides.pop(key) for key in ("jobs", "cluster") if key in overrides}
        how = convert({"jobs": "1", "cluster": "0"} | own, {"jobs": int, "cluster": int})
        paths = fan_out(concept, base, method, overrides, library=library, runs=RUNS, force=force, **how)
    else:
        request = Request(
            concept=concept[0], base=base, method=method, interval=interval, overrides=overrides, force=force
        )
        paths = train_concept(request, library=library, runs=RUNS, resume=resume)
    for path in paths:
        typer.echo(path)


def generate(
    prompt: Annotated[str, typer.Argument(help="For instance: a <dog> on the beach")],
    adapter: Annotated[list[str], typer.Option(metavar="NAME|FILE", help="A concept; repeatable.")] = [],  # noqa: B006
    strengths: Numbers = "",
    base: Annotated[str, typer.Option(metavar="ID", help="Default: what the adapters were trained for.")] = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the images go.")] = Path("outputs"),
    seed: Annotated[int, typer.Option(metavar="N", help="Of the first image; the next has the next.")] = 0,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="How many images.")] = 1,
    region: Annotated[
        list[str],
        typer.Option(metavar="L,T,R,B[,NAME…]:PROMPT", help='A prompt for a part: "0,0,.5,1: a <dog>"; repeatable.'),
    ] = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
) -> None:
    """Make images, with any concepts. --set takes steps and guidance (default: what is usual for the base model),
    negative_prompt, gated (1: each concept acts only where it is named), whole_scene (0: a region hears its own prompt
    only, nothing of the other ones), precision (fp32, bf16, fp16 or nf4; on a GPU SDXL, SD3 and FLUX are drawn in
    bf16)."""
    kinds = {"steps": int, "guidance": float, "negative_prompt": str, "gated": flag, "whole_scene": flag}
    kinds |= {"precision": str}
    options = convert(parse_settings(settings), kinds)
    with imported_for_good():
        from sbora_diffusion.cli.generate import images
        from sbora_diffusion.inference.image_file import save_numbered
        from sbora_diffusion.library.library import Library

        hide_loading_bars()
    adapters = [Library(ADAPTERS).load(name) for name in adapter]
    factors, seeds = parse_numbers(strengths, len(adapters)), range(seed, seed + count)
    for image, made in images(base, prompt, adapters, factors, seeds, region, options):
        typer.echo(save_numbered(image, out, made))


def merge(
    names: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="What to put together.")],
    how: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="fuse: solve for what disturbs each concept least (default where the base model is at hand); "
            "sum: exact and removable; or a method's own.",
        ),
    ] = "",
    weights: Numbers = "",
    prior_weight: Annotated[
        float, typer.Option(metavar="NUMBER", help="Of fuse: how much it counts that all else stays as it was.")
    ] = 0.3,
    base: Annotated[str, typer.Option(metavar="ID", help="To solve on; default: what the first was trained for.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: adapters/NAME+NAME.safetensors.")] = None,
    force: Force = False,
) -> None:
    """Put concepts together into one concept file."""
    with imported_for_good():
        from sbora_diffusion.adapters.certificate import certify
        from sbora_diffusion.adapters.merge import merged_name
        from sbora_diffusion.cli.merge import sampling_progress
        from sbora_diffusion.library.library import Library
        from sbora_diffusion.methods.merging import merge as merge_adapters
        from sbora_diffusion.methods.registry import find_method

        hide_loading_bars()
    if len(names) < 2:
        raise SboraError(f"got {names[0]} alone, expected two concepts or more")
    library = Library(ADAPTERS)
    adapters = [library.load(name) for name in names]
    find_method(adapters[0].spec.method_name).find_merge(how)
    numbers = parse_numbers(weights, len(adapters))
    path = out or library.path(merged_name(adapters))
    if path.exists() and not force:  # before minutes of work
        raise SboraError(f"{path} exists", hint="Choose another --out, or overwrite it with --force.")
    with sampling_progress() as progress:
        merged = merge_adapters(
            adapters, numbers if weights else None, how, base or None, prior_weight, on_progress=progress
        )
    merged.save(path, force)
    spec = merged.spec
    how = str(spec.recipe["how"])
    if spec.method:
        log.info("merged by %s, as %s is; nothing is guaranteed", how, spec.method)
    elif how == "fuse":
        log.info(FUSED)
    else:
        log.info(certify(adapters, library.widths(spec.base_fingerprint, spec.side)).describe())
        if len(spec.parents) > MANY:
            log.info("a plain sum of %d concepts loses more of them than --how fuse does", len(spec.parents))
    log.info('next: sbora-diffusion generate "%s" --adapter %s', " and ".join(spec.tokens), path)
    typer.echo(path)
