"""The studio as a Hugging Face Space, or on any machine that others reach: `python app.py`."""

from sbora_diffusion.console import set_up_logging
from sbora_diffusion.ui import open_studio

if __name__ == "__main__":
    set_up_logging()
    open_studio("0.0.0.0", 7860, (), open_browser=False)
