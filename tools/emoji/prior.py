"""The images of the recipes' prior prompts that ship with emoji64, so that no training has to draw them.

One command, after the weights, the prompts or the way of drawing changed: `python -m tools.emoji.prior`
"""

from sbora_diffusion.data.latents import FILE, save_prior
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import load_base
from sbora_diffusion.models.loading import EMBEDDED
from tools.emoji.model import WEIGHTS

if __name__ == "__main__":
    save_prior(load_base(EMBEDDED), configure(EMBEDDED, "sbora-fa", {}), WEIGHTS / FILE)
