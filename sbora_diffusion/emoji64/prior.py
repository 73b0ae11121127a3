"""The pictures of the recipes' prior prompts that ship with emoji64, so that no training has to draw them.

One command, after the weights, the prompts or the way of drawing changed: `python -m sbora_diffusion.emoji64.prior`
"""

from sbora_diffusion.diffusion.base import load_base
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.loading import EMBEDDED
from sbora_diffusion.diffusion.prior import FILE, save_prior
from sbora_diffusion.emoji64.model import WEIGHTS

if __name__ == "__main__":
    save_prior(load_base(EMBEDDED), TrainConfig.from_recipe(EMBEDDED, "sbora-fa", {}), WEIGHTS / FILE)
