"""Denoising losses: on the concept's images, on predictions to preserve, and on images of the class."""

from dataclasses import dataclass

from torch import Tensor

from sbora_diffusion.data.batches import StepBatch
from sbora_diffusion.training.losses.base import Predictions, mean_error


@dataclass(frozen=True)
class Denoising:
    """The diffusion or flow-matching loss on the concept's images.

    Args:
        masked: whether only what the images' masks show counts.
    """

    masked: bool
    weight: float = 1.0

    def __call__(self, batch: StepBatch, predictions: Predictions) -> Tensor:
        return mean_error(predictions.concept, batch.concept, self.masked)


@dataclass(frozen=True)
class PriorPreservation:
    """The squared difference from predictions that the base model made before the training.

    Args:
        own_pass: apply to prior samples of another shape than the concept samples, which need their own forward pass;
            otherwise to those that share the concept samples' pass.
    """

    weight: float
    own_pass: bool

    def __call__(self, batch: StepBatch, predictions: Predictions) -> Tensor | None:
        if batch.prior is None or batch.prior_fits == self.own_pass:
            return None
        return mean_error(predictions.prior, batch.prior, masked=False)


@dataclass(frozen=True)
class ClassImages:
    """The denoising loss on the base model's images of the class noun (DreamBooth, Ruiz et al. 2023, section 3.3)."""

    weight: float

    def __call__(self, batch: StepBatch, predictions: Predictions) -> Tensor | None:
        if batch.class_images is None:
            return None
        return mean_error(predictions.class_images, batch.class_images, masked=False)
