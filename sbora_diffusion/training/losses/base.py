"""What a loss is: a weight, and a function of a batch and of the model's predictions for it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from sbora_diffusion.data.batches import StepBatch
from sbora_diffusion.data.latents import Batch

Recording = Callable[[StepBatch], AbstractContextManager[Any]]


def no_recording(_: StepBatch) -> AbstractContextManager[Any]:
    """Record nothing."""
    return nullcontext()


class Predictions:
    """The model's predictions for a batch, computed when a loss needs them.

    Concept and prior samples of one shape go through the model in one forward pass.

    Args:
        predict: the model.
        recording: opened around the forward pass of the concept samples.
    """

    def __init__(self, batch: StepBatch, predict: Callable[[Batch], Tensor], recording: Recording) -> None:
        self._batch, self._predict, self._recording = batch, predict, recording

    @property
    def concept(self) -> Tensor:
        return self._concept_and_prior[0]

    @property
    def prior(self) -> Tensor:
        assert self._batch.prior is not None
        return self._concept_and_prior[1] if self._batch.prior_fits else self._predict(self._batch.prior)

    @property
    def class_images(self) -> Tensor:
        assert self._batch.class_images is not None
        return self._predict(self._batch.class_images)

    @cached_property
    def _concept_and_prior(self) -> tuple[Tensor, ...]:
        concept, prior = self._batch.concept, self._batch.prior
        with self._recording(self._batch):
            if prior is None or not self._batch.prior_fits:
                return (self._predict(concept),)
            both = Batch(*(torch.cat([getattr(concept, key), getattr(prior, key)]) for key in vars(prior)))
            return self._predict(both).split([len(concept.t), len(prior.t)])


class Loss(Protocol):
    """One term of what a training minimizes."""

    @property
    def weight(self) -> float: ...

    def __call__(self, batch: StepBatch, predictions: Predictions, /) -> Tensor | None:
        """Return a scalar, or None if the batch has nothing to measure."""
        ...


@dataclass(frozen=True, eq=False)
class Objective:
    """Losses by name that are differentiated together, while `recording` is open.

    Gradient checkpointing computes forward passes again during the backward pass, where a recording has to see the
    same passes: so each recording has an objective of its own.
    """

    losses: Mapping[str, Loss]
    recording: Recording = no_recording

    def __call__(self, batch: StepBatch, predictions: Predictions) -> dict[str, Tensor]:
        """Return the weighted losses of a batch."""
        values = {name: (loss.weight, loss(batch, predictions)) for name, loss in self.losses.items()}
        return {name: weight * value for name, (weight, value) in values.items() if value is not None}


def mean_error(predicted: Tensor, batch: Batch, masked: bool) -> Tensor:
    """Return the mean squared error, a scalar; weighted by samples and by masks if the batch has them, 0 if empty."""
    error, masks = (predicted - batch.target).pow(2), getattr(batch, "masks", None)
    if masked and masks is not None:
        by_sample = (error * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) * error.shape[1]).clamp(min=1e-6)
    else:
        by_sample = error.flatten(1).mean(1)
    weights = getattr(batch, "weights", None)
    return (by_sample if weights is None else by_sample * weights).sum() / max(1, len(by_sample))
