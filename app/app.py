"""Serve the studio as a Hugging Face Space, or on any machine that others can reach: `python app.py`."""

from sbora_diffusion.cli.console import set_up_logging, share_cores

if __name__ == "__main__":
    share_cores()
    set_up_logging()
    from sbora_diffusion.studio.app import open_studio  # imports torch

    open_studio("0.0.0.0", 7860, (), open_browser=False)
