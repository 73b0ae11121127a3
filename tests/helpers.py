"""A short recipe, and a training after some steps."""

from torch import Tensor

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.trainer import Run

INTERVAL = Interval(4, 4)
SHORT = {
    "steps": "6",
    "save_every": "2",
    "preview_every": "0",
    "sampling_steps": "2",
    "crops": "2",
    "rank": "4",
    "warmup_steps": "1",
}


def short_config(method: str = "sbora-fa", **settings: str) -> TrainConfig:
    return configure("tiny", method, SHORT | settings)


def run_of(base: Base, concept: Concept, config: TrainConfig, steps: int = 1) -> tuple[Run, list[Tensor]]:
    """A training after some steps, and its gradients."""
    data = prepare_data(concept, base, config)
    with injected_concept(concept, base, INTERVAL, config) as live:
        run = Run(live, data, config, base)
        for step in range(steps):
            run.advance(step)
        return run, [p.grad.clone() for p in live.parameters() if p.grad is not None]
