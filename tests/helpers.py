"""A short recipe, whole and interrupted trainings, and a trainer after some steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept, ConceptImage
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import StepLog
from sbora_diffusion.training.train import TrainingResult, run_training
from sbora_diffusion.training.trainer import Trainer

INTERVAL = Interval(4, 4)
SHORT = {
    "steps": "6",
    "save_every": "2",
    "preview_every": "0",
    "sampling_steps": "1",
    "preview_prompts": "a {token}",
    "prior_prompts": "a cat",
    "crops": "2",
    "rank": "4",
    "warmup_steps": "1",
}


def short_config(method: str = "sbora-fa", **settings: str) -> TrainConfig:
    return configure("tiny", method, SHORT | settings)


def save_concept(folder: Path) -> Concept:
    """Write two images."""
    images = []
    for number, colour in enumerate(("red", "orange")):
        path = folder / f"{number}.png"
        Image.new("RGB", (40, 60), colour).save(path)
        images.append(ConceptImage(path=path, caption=f"a <rex> in place {number}"))
    return Concept(name="rex", token="<rex>", class_noun="dog", images=tuple(images))


def save_tall_concept(folder: Path) -> Concept:
    """Write four images: three wide ones, of which two are transparent around their subject, and a high one."""
    images = []
    for number, size in enumerate(((60, 40), (64, 40), (60, 40), (40, 70))):
        image = Image.new("RGBA" if number < 2 else "RGB", size, (0, 0, 0, 0) if number < 2 else "white")
        colour = ("red", "orange", "blue", "green")[number]
        ImageDraw.Draw(image).ellipse((4, 6, size[0] // 2, size[1] - 9), fill=colour)
        path = folder / f"{number}.png"
        image.save(path)
        images.append(ConceptImage(path=path, caption=f"a <rex>, in place {number}, at night, wet"))
    return Concept(name="rex", token="<rex>", class_noun="dog", images=tuple(images))


@dataclass(frozen=True)
class Trained:
    """A whole training: its logs and its result."""

    logs: list[StepLog]
    result: TrainingResult

    @property
    def adapter(self) -> Adapter:
        return self.result.adapter


def train(
    concept: Concept, base: Base, interval: Interval | None, config: TrainConfig, folder: Path, **options: Any
) -> Trained:
    """Train from start to end, or from a checkpoint with resume=True."""
    logs: list[StepLog] = []
    return Trained(logs, run_training(concept, base, interval, config, folder, on_step=logs.append, **options))


class Stopped(Exception):
    """Raised where a training is to be interrupted."""


def train_until(
    step: int,
    concept: Concept,
    base: Base,
    interval: Interval | None,
    config: TrainConfig,
    folder: Path,
    **options: Any,
) -> StepLog:
    """Interrupt a training after a step of this number; return that step's log."""
    logs: list[StepLog] = []

    def stop(entry: StepLog) -> None:
        logs.append(entry)
        if entry.step == step:
            raise Stopped

    try:
        run_training(concept, base, interval, config, folder, on_step=stop, **options)
    except Stopped:
        return logs[-1]
    raise AssertionError("the training was not interrupted")


def trainer_after(base: Base, concept: Concept, config: TrainConfig, steps: int = 1) -> tuple[Trainer, list[Tensor]]:
    """Return a trainer after some steps, and its gradients."""
    data = prepare_data(concept, base, config)
    with injected_concept(concept, base, INTERVAL, config) as live:
        trainer = Trainer(live, data, config, base)
        for step in range(steps):
            trainer.train_step(step)
        return trainer, [p.grad.clone() for p in live.parameters() if p.grad is not None]
