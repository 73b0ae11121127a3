"""Score any folder of images against the prompts they were made from and the references they should resemble.

python eval/clip_alignment.py IMAGES --prompts FILE --references DIR --class-noun dog [--encoder ID] [--out FILE]

Which prompt an image was made from is told by its name, "<prompt's number>-<seed>.png" with the first prompt as 0
(what `sbora-diffusion eval` writes), or by a JSON file {"<image's name>": "<prompt in plain words>"}.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_loading_bars, set_up_logging, told_in_a_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@told_in_a_line()
def main(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of images.")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="A suite, or a JSON file of image -> prompt.")],
    references: Annotated[
        list[Path], typer.Option(metavar="DIR", help="The concept's images; further ones are of others.")
    ],
    class_noun: Annotated[
        list[str], typer.Option(metavar="NOUN", help="What it is in plain words; one for each concept in an image.")
    ] = [],  # noqa: B006
    encoder: Annotated[str, typer.Option(metavar="ID", help="The judge.")] = "openai/clip-vit-base-patch32",
    vision: Annotated[str, typer.Option(metavar="ID", help="A second judge of images, such as a DINO.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number as JSON.")] = None,
) -> None:
    """Text and image alignment of a folder of images.

    The first references are those of the concepts in the images, one folder for each class noun; all further folders
    are concepts that they may be mistaken for, which gives the success rate.
    """
    set_up_logging()
    from sbora_diffusion.evaluation.encoders import load_encoder, load_vision
    from sbora_diffusion.evaluation.folder import score_folder
    from sbora_diffusion.evaluation.gallery import write_text
    from sbora_diffusion.evaluation.report import to_json
    from sbora_diffusion.evaluation.tables import to_markdown

    hide_loading_bars()
    second = load_vision(vision) if vision else None
    report = score_folder(images, prompts, references, class_noun, load_encoder(encoder), second)
    report = replace(report, about=report.about | {"command": shlex.join(["python", *sys.argv])})
    typer.echo(to_markdown(report))
    if out:
        write_text(to_json(report, images), out)
        typer.echo(out)


if __name__ == "__main__":
    app()
