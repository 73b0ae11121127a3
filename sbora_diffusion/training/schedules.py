"""How the learning rates go over a training."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sbora_diffusion.training.config import TrainConfig


def rate_factor(step: int, config: "TrainConfig") -> float:
    """What the rates are multiplied by at a step (from 0): a linear warm-up, then the scheduler.

    "linear" and "cosine" come down to `final_rate` at the last step, "constant" stays.
    """
    progress = step / config.steps
    left = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[config.scheduler]
    decayed = config.final_rate + (1 - config.final_rate) * left
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * decayed
