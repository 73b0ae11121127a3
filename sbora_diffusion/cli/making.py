"""Commands that make images and merges: generate, merge."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    convert,
    flag,
    hide_loading_bars,
    imported_for_good,
    parse_numbers,
    parse_settings,
)
from sbora_diffusion.cli.options import Force, Numbers, Settings
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

MANY = 6  # concepts of which a plain sum keeps nearly all (docs/results.md)
FUSED = """guaranteed: only the concepts' own columns or rows are written; the same file, to the bit, in any order;
taken out as a whole, to the bit. Not guaranteed: images; measure them: sbora-diffusion eval"""


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
            metavar="NAME", help="sum, or fuse: solve for what disturbs each concept least; or a method's own."
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
        from sbora_diffusion.adapters.merge import merge as merge_adapters
        from sbora_diffusion.adapters.merge import merged_name
        from sbora_diffusion.library.library import Library
        from sbora_diffusion.methods.registry import merge_choice

    if len(names) < 2:
        raise SboraError(f"got {names[0]} alone, expected two concepts or more")
    library = Library(ADAPTERS)
    adapters = [library.load(name) for name in names]
    how = merge_choice(adapters[0].spec.method_name, how)
    numbers = parse_numbers(weights, len(adapters))
    path = out or library.path(merged_name(adapters))
    if adapters[0].spec.method:
        from sbora_diffusion.cli.merge import merged_as_its_paper_does

        hide_loading_bars()
        merged = merged_as_its_paper_does(adapters, numbers if weights else None, how, base)
    elif how == "sum":
        merged = merge_adapters(adapters, numbers, how)
    else:
        from sbora_diffusion.cli.merge import fuse_on_samples

        if path.exists() and not force:  # before minutes of work
            raise SboraError(f"{path} exists", hint="Choose another --out, or overwrite it with --force.")
        hide_loading_bars()
        merged = fuse_on_samples(adapters, numbers, base, prior_weight)
    merged.save(path, force)
    spec = merged.spec
    widths = library.widths(spec.base_fingerprint, spec.side)
    if spec.method:
        log.info("merged by %s, as %s is; nothing is guaranteed", how, spec.method)
    else:
        log.info(certify(adapters, widths).describe() if how == "sum" else FUSED)
        if how == "sum" and len(spec.parents) > MANY:
            log.info("a plain sum of %d concepts loses more of them than --how fuse does", len(spec.parents))
    log.info('next: sbora-diffusion generate "%s" --adapter %s', " and ".join(spec.tokens), path)
    typer.echo(path)
