"""How the learning rates go over a training."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sbora_diffusion.recipes.config import TrainConfig


def learning_rate_factor(step: int, config: "TrainConfig") -> float:
    """What the rates are multiplied by at a step (from 0): a linear warm-up, then the scheduler.

    "linear" and "cosine" come down to `final_learning_rate` at the last step, "constant" stays.
    """
    progress = step / config.optim.steps
    left = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
        config.optim.scheduler
    ]
    decayed = config.optim.final_learning_rate + (1 - config.optim.final_learning_rate) * left
    return min(1.0, (step + 1) / max(1, config.optim.warmup_steps)) * decayed
