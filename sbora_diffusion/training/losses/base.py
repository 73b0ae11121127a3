"""The losses that a training minimizes: each a weight and a function of a batch and the model's predictions."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from sbora_diffusion.adapters.fuse import response
from sbora_diffusion.adapters.layer import SboraLayer
from sbora_diffusion.adapters.linear_function import full_weight
from sbora_diffusion.data.batches import Data, StepBatch
from sbora_diffusion.data.latents import Batch
from sbora_diffusion.methods.live import InjectedConcept
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError

Recording = Callable[[StepBatch], AbstractContextManager[Any]]


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
    recording: Recording = nullcontext

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


class OutputPenalty:
    """The mean over the layers of E‖ΔW x‖² / E‖W x‖² on inputs x recorded before the training.

    BlockLoRA's output erasure (arXiv 2503.08575) on randomised inputs is, in a linear layer's mean, the quadratic form
    tr(ΔW E[x xᵀ] ΔWᵀ); for SBoRA-FA it needs r × r moments only.
    """

    def __init__(
        self,
        base: Base,
        layers: Mapping[str, Mapping[str, SboraLayer]],
        moments: Mapping[str, Tensor],
        weight: float = 1.0,
    ) -> None:
        self.weight = weight
        by_shape: dict[tuple[object, ...], list[tuple[SboraLayer, Tensor]]] = {}
        for component, by_name in layers.items():
            for name, layer in by_name.items():
                frozen = full_weight(base.layers[f"{component}.{name}"].weight).detach().float()
                seen = moments[f"{component}.{name}"].to(frozen)
                own = seen[layer.index][:, layer.index] if layer.side == "fa" else seen
                shape = (*layer.trained.shape, *own.shape)
                by_shape.setdefault(shape, []).append((layer, own / response(frozen, seen)))
        groups = [zip(*group, strict=True) for group in by_shape.values()]  # layers of one shape: one batched product
        self._groups = [(layers, torch.stack(of_layers)) for layers, of_layers in groups]
        self._count = sum(len(layers) for layers, _ in self._groups)

    def __call__(self, *_: object) -> Tensor:
        """Return the mean over the layers."""
        responses = [
            response(torch.stack([layer.delta() for layer in layers]), of_layers) for layers, of_layers in self._groups
        ]
        return torch.stack(responses).sum() / self._count


def make_objectives(
    base: Base, live: InjectedConcept, data: Data, config: TrainConfig, num_processes: int
) -> tuple[list[Objective], Recording]:
    """Return the objectives in the order of their backward passes, and what to record of the concept's forward pass.

    Raises:
        SboraError: a loss on whole batches with several processes.
    """
    weights = config.loss
    on_concept: dict[str, Loss] = {
        "denoising": Denoising(weights.masked_loss),
        "prior": PriorPreservation(weights.prior_weight, own_pass=False),
    }
    others: dict[str, Loss] = {
        "prior_own_pass": PriorPreservation(weights.prior_weight, own_pass=True),
        "class_images": ClassImages(weights.class_weight),
    }
    if data.moments:
        others["output_penalty"] = OutputPenalty(base, live.layers, data.moments, weights.output_penalty)
    has_masks = any(group.masks is not None for group in data.images)
    attention_weight = weights.attention_weight if has_masks else 0
    if num_processes > 1 and (weights.erasure_weight or attention_weight):
        raise SboraError(
            "erasure_weight and attention_weight need whole batches, which several processes do not have",
            "train in one process, or set them to 0",
        )
    record: Recording = nullcontext
    if weights.erasure_weight:
        from sbora_diffusion.training.losses.output_erasure import OutputErasure

        others["output_erasure"] = erasure = OutputErasure(base, live.layers, weights.erasure_weight)
        record = erasure.recording
    if attention_weight:
        from sbora_diffusion.training.losses.attention import AttentionLoss

        on_concept["attention"] = attention = AttentionLoss(base, attention_weight)
        return [Objective(on_concept, attention.recording), Objective(others)], record
    return [Objective(on_concept | others)], record
