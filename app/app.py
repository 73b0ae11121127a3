"""Serve the studio as a Hugging Face Space, or on any machine that others can reach: `python app.py`."""

import os
import sys

from sbora_diffusion.cli.console import set_up_logging, share_cores
from sbora_diffusion.utils.errors import SboraError


def serve() -> None:
    """Serve on all addresses, with the password in SBORA_AUTH."""
    from sbora_diffusion.studio.app import open_studio  # imports torch
    from sbora_diffusion.studio.door import Door, parse_auth

    space = os.environ.get("SPACE_HOST")  # set by Hugging Face, whose page embeds the Space
    door = Door(
        host="0.0.0.0",
        names=(space.lower(),) if space else (),
        auth=parse_auth(os.environ.get("SBORA_AUTH")),
        framed_by=("https://huggingface.co",) if space else (),
    )
    open_studio(door, 7860, (), open_browser=False)


if __name__ == "__main__":
    share_cores()
    set_up_logging()
    try:
        serve()
    except SboraError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
