"""Serve the studio as a Hugging Face Space, or on any machine that others can reach: `python app.py`."""

import os

from sbora_diffusion.cli.console import one_line_errors, set_up_logging, share_cores

if __name__ == "__main__":
    share_cores()
    set_up_logging()
    with one_line_errors():
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
