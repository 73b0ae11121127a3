"""`sbora-diffusion generate`: images of a prompt, with any concepts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbora_diffusion.cli.console import (
    ADAPTERS,
    AdapterBase,
    Floats,
    Settings,
    boolean,
    convert,
    hide_loading_bars,
    parse_floats,
    parse_settings,
)

if TYPE_CHECKING:
    from PIL import Image

    from sbora_diffusion.inference.image_file import Settings as ImageSettings

KINDS = {
    "steps": int,
    "guidance": float,
    "negative_prompt": str,
    "gated": boolean,
    "whole_scene": boolean,
    "precision": str,
}


def generate(
    prompt: Annotated[str, typer.Argument(help="For instance: a <dog> on the beach")],
    adapter: Annotated[list[str], typer.Option(metavar="NAME|FILE", help="A concept; repeatable.")] = [],  # noqa: B006
    strengths: Floats = "",
    base: AdapterBase = "",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to save the images.")] = Path("outputs"),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the first image; each further one adds 1.")] = 0,
    count: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="How many images.")] = 1,
    region: Annotated[
        list[str],
        typer.Option(metavar="L,T,R,B[,NAME…]:PROMPT", help='A prompt for a part: "0,0,.5,1: a <dog>"; repeatable.'),
    ] = [],  # noqa: B006
    settings: Settings = [],  # noqa: B006
) -> None:
    """Generate images, with any concepts.

    --set takes steps and guidance (default: the base model's), negative_prompt, gated (apply each concept only where it
    is named), whole_scene (false: each region gets only its own prompt) and precision (fp32, bf16, fp16 or nf4; on a
    GPU the default for SDXL, SD3 and FLUX is bf16).
    """
    options = convert(parse_settings(settings), KINDS)
    import sbora_diffusion as sbora
    from sbora_diffusion.inference.image_file import save_numbered

    def save(image: "Image.Image", made: "ImageSettings") -> None:
        typer.echo(save_numbered(image, out, made))

    hide_loading_bars()
    sbora.generate(
        prompt,
        adapter,
        base=base,
        strengths=parse_floats(strengths),
        seeds=range(seed, seed + count),
        regions=region,
        library=ADAPTERS,
        on_image=save,
        **options,
    )
