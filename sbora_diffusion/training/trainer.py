"""A training under way: its optimiser, one step after the other, and the state to resume it."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.data.batches import BatchSampler, Data, Sample
from sbora_diffusion.data.latents import Batch
from sbora_diffusion.methods.live import InjectedConcept
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import SINGLE_PROCESS, Processes
from sbora_diffusion.models.precision import Precision
from sbora_diffusion.models.text_cache import TextEmbeddingCache
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.ema import EMA
from sbora_diffusion.training.losses.attention import AttentionLoss
from sbora_diffusion.training.losses.output_erasure import OutputErasure
from sbora_diffusion.training.losses.output_penalty import OutputPenalty
from sbora_diffusion.training.optim import eval_parameters, make_optimizer
from sbora_diffusion.training.schedules import learning_rate_factor
from sbora_diffusion.utils.errors import SboraError


@dataclass(frozen=True, eq=False)
class Scored:
    """What was learned up to a step, and how good its images are."""

    step: int
    scores: dict[str, float]
    parameters: list[Tensor]


class Run:
    """The optimiser and the data of a training, at some step."""

    def __init__(
        self, live: InjectedConcept, data: Data, config: TrainConfig, base: Base, processes: Processes = SINGLE_PROCESS
    ) -> None:
        self.step, self.mean_loss, self.samples_per_second = 0, float("nan"), 0.0
        self.best: Scored | None = None
        self._live, self._config, self._base, self._processes = live, config, base, processes
        self._samples = BatchSampler(data, base, config, processes)
        self._held_out = self._samples.held_out()
        self._loudness = OutputPenalty(base, live.layers, data.moments) if data.moments else None
        self._erasure = OutputErasure(base, live.layers) if config.loss.erasure_weight else None
        has_masks = any(shots.masks is not None for shots in data.shots)
        self._attention = AttentionLoss(base) if config.loss.attention_weight and has_masks else None
        if processes.count > 1 and (self._erasure or self._attention):
            raise SboraError(
                "erasure_weight and attention_weight look at whole batches, which several processes do not see",
                "train in one process, or set them to 0",
            )
        is_frozen = live.trained.keys() <= {base.family.denoiser}  # all text encoders are
        self._readings = (
            TextEmbeddingCache(base, learns_token=config.optim.token_learning_rate > 0) if is_frozen else None
        )
        self._precision = Precision(config.model.precision, base.device)
        groups: list[dict[str, Any]] = [
            {
                "params": parameters,
                "lr": config.optim.learning_rate
                if part == base.family.denoiser
                else config.optim.text_encoder_learning_rate,
            }
            for part, parameters in live.trained.items()
        ]
        groups.append({"params": live.embeddings, "lr": config.optim.token_learning_rate})
        self._optimizer = make_optimizer(groups, config, base.device)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, config)
        )
        self._averages = EMA(live.parameters(), config.optim.ema) if config.optim.ema else None

    @property
    def learning_rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    def advance(self, step: int) -> float:
        """One optimiser step; returns the loss on the concept."""
        began, parts = time.perf_counter(), self._config.optim.accumulation
        self._optimizer.zero_grad()
        value = sum(self._learn_from_a_batch(step * parts + part) for part in range(parts)) / parts
        value = self._processes.average(self._live.parameters(), value)
        self._precision.step(self._optimizer, self._named_parameters(), self._config.optim.max_grad_norm, value, step)
        self._schedule.step()
        self.step = step + 1
        if self._averages:
            self._averages.update(self.step)
        seconds = time.perf_counter() - began
        if math.isfinite(value):  # not so of a batch that fp16 skips
            self.mean_loss = value if math.isnan(self.mean_loss) else 0.98 * self.mean_loss + 0.02 * value
        self.samples_per_second = self._config.data.batch_size * self._processes.count * parts / seconds
        return value

    def _learn_from_a_batch(self, number: int) -> float:
        """The gradients of the batch of this number; its loss on the concept."""
        config, generator = self._config, torch.Generator().manual_seed(batch_seed(self._config.seed, number))
        sample, prior = self._samples.of_concept(generator), self._samples.of_prior(generator)
        of_class = self._samples.of_class(generator)
        goes_along = len(prior.t) > 0 and sample.noisy.shape[1:] == prior.noisy.shape[1:]
        with self._attention.recording(sample) if self._attention else nullcontext():
            own, loss = self._errors(sample, prior if goes_along else None)
            if self._attention:
                loss = loss + config.loss.attention_weight * self._attention()
                self._precision.backward(
                    loss / config.optim.accumulation
                )  # still watched, for checkpoints compute it anew
                loss = loss.detach()
        if len(prior.t) and not goes_along:
            loss = loss + config.loss.prior_weight * mean_error(self._predict(prior), prior, masked=False)
        if of_class:
            loss = loss + config.loss.class_weight * mean_error(self._predict(of_class), of_class, masked=False)
        if self._loudness:
            loss = loss + config.loss.output_penalty * self._loudness()
        if self._erasure:
            loss = loss + config.loss.erasure_weight * self._erasure()
        self._precision.backward(loss / config.optim.accumulation)
        return own.item() if torch.isfinite(loss) else float("nan")

    def _errors(self, sample: Sample, prior: Batch | None) -> tuple[Tensor, Tensor]:
        """On the concept; and with it that on what is to hold, if it goes through the model in the same pass."""
        masked = bool(self._config.loss.masked_loss)
        if prior is None:
            own = mean_error(self._predict(sample), sample, masked)
            return own, own
        both = Batch(*(torch.cat([getattr(sample, key), getattr(prior, key)]) for key in vars(prior)))
        with self._erasure.recording(len(prior.t)) if self._erasure else nullcontext():
            answered = self._predict(both)
        ours, held = answered.split([len(sample.t), len(prior.t)])
        own = mean_error(ours, sample, masked)
        return own, own + self._config.loss.prior_weight * mean_error(held, prior, masked=False)

    def _predict(self, batch: Batch) -> Tensor:
        with self._precision.arithmetic():
            if self._readings:
                answered = self._base.predict(batch.noisy, batch.t, self._readings(batch.ids))
            else:
                answered = self._base.predict(batch.noisy, batch.t, self._base.encode_text(batch.ids))
        return answered.float()

    @torch.no_grad()
    def validate(self) -> float:
        """The loss on the images that are held out, of what would be the result now."""
        with self.eval_parameters():
            errors = [
                mean_error(self._predict(part), part, masked=False).item() * len(part.t) for part in self._held_out
            ]
        return sum(errors) / sum(len(part.t) for part in self._held_out)

    @contextmanager
    def eval_parameters(self) -> Iterator[None]:
        """Meanwhile the parameters are what the result would be now: averaged, if they are to be."""
        with eval_parameters(self._optimizer), self._averages.in_place() if self._averages else nullcontext():
            yield

    def rate(self, scores: Mapping[str, float]) -> None:
        """Remember what is learned now if no step before scored as high; "overall" decides."""
        if self.best is None or scores["overall"] > self.best.scores["overall"]:
            with self.eval_parameters():
                kept = [parameter.detach().clone() for parameter in self._live.parameters()]
            self.best = Scored(self.step, dict(scores), kept)

    def restore_best(self, scored: Scored) -> None:
        """Take up what was learned up to an earlier step."""
        self._set_parameters(scored.parameters)

    def _named_parameters(self) -> Mapping[str, Sequence[Tensor]]:
        parts = {part: [*parameters] for part, parameters in self._live.trained.items()}
        return parts | {"token": [*self._live.embeddings]}

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "step": self.step,
            "mean_loss": self.mean_loss,
            "parameters": [parameter.detach() for parameter in self._live.parameters()],
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "averages": self._averages and self._averages.values,
            "precision": self._precision.state(),
            "best": self.best and vars(self.best),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.step, self.mean_loss = state["step"], state["mean_loss"]
        self.best = state["best"] and Scored(**state["best"])
        self._set_parameters(state["parameters"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._precision.load(state["precision"])
        if self._averages:
            self._averages.load(state["averages"])

    @torch.no_grad()
    def _set_parameters(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._live.parameters(), values, strict=True):
            parameter.copy_(value)


def batch_seed(seed: int, number: int) -> int:
    """The seed of a training's batch of this number."""
    return (seed * 1_000_003 + number) % 2**63


def mean_error(answered: Tensor, batch: Batch, masked: bool) -> Tensor:
    """The mean squared error, a scalar: within the masks, by the samples' weights, where there are any; 0 of none."""
    error, masks = (answered - batch.target).pow(2), getattr(batch, "masks", None)
    if masked and masks is not None:
        by_sample = (error * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) * error.shape[1]).clamp(min=1e-6)
    else:
        by_sample = error.flatten(1).mean(1)
    weights = getattr(batch, "weights", None)
    return (by_sample if weights is None else by_sample * weights).sum() / max(1, len(by_sample))
