"""Score any folder of images against the prompts they were made from and the references they should resemble.

python eval/clip_alignment.py IMAGES --prompts FILE --references DIR --class-noun dog [--encoder ID] [--out FILE]

The prompt of an image is given by its name, "<prompt's number>-<seed>.png" with the first prompt as 0 (as written by
`sbora-diffusion eval`), or by a JSON file {"<image's name>": "<prompt in plain words>"}.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sbora_diffusion.cli.console import hide_loading_bars, one_line_errors, set_up_logging

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@one_line_errors()
def main(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of images.")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="A suite, or a JSON file of image -> prompt.")],
    references: Annotated[
        list[Path], typer.Option(metavar="DIR", help="The concept's images; further folders: other concepts.")
    ],
    class_noun: Annotated[
        list[str], typer.Option(metavar="NOUN", help="The concept in plain words; one for each concept in an image.")
    ] = [],  # noqa: B006
    encoder: Annotated[str, typer.Option(metavar="ID", help="The judge.")] = "openai/clip-vit-base-patch32",
    vision: Annotated[str, typer.Option(metavar="ID", help="A second judge of images, such as a DINO.")] = "",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all scores as JSON.")] = None,
) -> None:
    """Print the text and image alignment of a folder of images.

    The first references are those of the concepts in the images, one folder for each class noun; further folders are
    other concepts, from which the success rate is computed.
    """
    set_up_logging()
    from sbora_diffusion.evaluation.folder import score_folder
    from sbora_diffusion.evaluation.judges import load_judge
    from sbora_diffusion.evaluation.report import to_json, to_markdown
    from sbora_diffusion.utils.files import write_file

    hide_loading_bars()
    judges = [load_judge(name) for name in (encoder, f"vision:{vision}" if vision else "") if name]
    report = score_folder(images, prompts, references, class_noun, judges)
    report = replace(report, about=report.about | {"command": shlex.join(["python", *sys.argv])})
    typer.echo(to_markdown(report))
    if out:
        write_file(out, to_json(report, images).encode(), overwrite=True)
        typer.echo(out)


if __name__ == "__main__":
    app()
