"""The trainer: batch, losses, backward pass, optimizer step; and the state to resume it."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.data.batches import BatchSampler, Data
from sbora_diffusion.data.latents import Batch
from sbora_diffusion.methods.live import InjectedConcept
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import SINGLE_PROCESS, Processes
from sbora_diffusion.models.tokens import TextEmbeddingCache
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.losses.base import Predictions, make_objectives, mean_error
from sbora_diffusion.training.optim import (
    EMA,
    Precision,
    eval_parameters,
    make_optimizer,
    make_schedule,
    parameter_groups,
    set_parameters,
)


class Trainer:
    """The optimizer and the data of a training, at some step."""

    def __init__(
        self, live: InjectedConcept, data: Data, config: TrainConfig, base: Base, processes: Processes = SINGLE_PROCESS
    ) -> None:
        self.step, self.mean_loss, self.samples_per_second = 0, float("nan"), 0.0
        self.num_steps = config.optim.steps
        self.best: dict[str, Any] = {}  # "step", "scores" and "parameters" of the best step
        self._live, self._config, self._base, self._processes = live, config, base, processes
        self._sampler = BatchSampler(data, base, config, processes)
        self._held_out = self._sampler.held_out()
        self._objectives, self._recording = make_objectives(base, live, data, config, processes.count)
        self._precision = Precision(config.model.precision, base.device)
        self._optimizer = make_optimizer(parameter_groups(live, config), config, base.device)
        self._schedule = make_schedule(self._optimizer, config)
        self._ema = EMA(live.parameters(), config.optim.ema) if config.optim.ema else None
        are_texts_frozen = live.trained.keys() <= {base.family.denoiser}
        learns_token = config.optim.token_learning_rate > 0
        self._encode_text = TextEmbeddingCache(base, learns_token) if are_texts_frozen else base.encode_text

    @property
    def learning_rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    def train_step(self, step: int) -> float:
        """Do one optimizer step; return the mean denoising loss on the concept's images."""
        began, num_batches = time.perf_counter(), self._config.optim.accumulation
        self._optimizer.zero_grad()
        loss = sum(self._backward(step * num_batches + part) for part in range(num_batches)) / num_batches
        loss = self._processes.average(self._live.parameters(), loss)
        self._precision.step(self._optimizer, self._named_parameters(), self._config.optim.max_grad_norm, loss, step)
        self._schedule.step()
        self.step = step + 1
        if self._ema:
            self._ema.update(self.step)
        self._update_statistics(loss, time.perf_counter() - began)
        return loss

    def _backward(self, number: int) -> float:
        """Add the gradients of one batch; return its denoising loss, or nan if any loss is not finite."""
        generator = torch.Generator().manual_seed(batch_seed(self._config.seed, number))
        batch = self._sampler.step_batch(generator)
        predictions = Predictions(batch, self._predict, self._recording)
        values: dict[str, Tensor] = {}
        for objective in self._objectives:
            with objective.recording(batch):
                losses = objective(batch, predictions)
                if losses:
                    self._precision.backward(_sum(losses) / self._config.optim.accumulation)
            values |= {name: loss.detach() for name, loss in losses.items()}
        return values["denoising"].item() if torch.isfinite(_sum(values)) else float("nan")

    def _predict(self, batch: Batch) -> Tensor:
        with self._precision.arithmetic():
            predicted = self._base.predict(batch.noisy, batch.t, self._encode_text(batch.ids))
        return predicted.float()

    def _update_statistics(self, loss: float, seconds: float) -> None:
        if math.isfinite(loss):  # it is not where fp16 skips a batch
            self.mean_loss = loss if math.isnan(self.mean_loss) else 0.98 * self.mean_loss + 0.02 * loss
        num_samples = self._config.data.batch_size * self._processes.count * self._config.optim.accumulation
        self.samples_per_second = num_samples / seconds

    @torch.no_grad()
    def validate(self) -> float:
        """Return the loss on the held-out images with the parameters of the result."""
        with self.eval_parameters():
            errors = [mean_error(self._predict(part), part, masked=False).item() for part in self._held_out]
        sizes = [len(part.t) for part in self._held_out]
        return sum(error * size for error, size in zip(errors, sizes, strict=True)) / sum(sizes)

    @contextmanager
    def eval_parameters(self) -> Iterator[None]:
        """Put the parameters of the result in place inside the context: averaged ones, if the settings say so."""
        with eval_parameters(self._optimizer), self._ema.in_place() if self._ema else nullcontext():
            yield

    def update_best(self, scores: Mapping[str, float]) -> None:
        """Store the current parameters if their "overall" score is the highest so far."""
        if not self.best or scores["overall"] > self.best["scores"]["overall"]:
            with self.eval_parameters():
                kept = [parameter.detach().clone() for parameter in self._live.parameters()]
            self.best = {"step": self.step, "scores": dict(scores), "parameters": kept}

    @contextmanager
    def result_parameters(self) -> Iterator[None]:
        """Put the parameters to save in place inside the context: the best step's with keep=best."""
        if self._config.output.keep == "best" and self.best:
            set_parameters(self._live.parameters(), self.best["parameters"])
            yield
        else:
            with self.eval_parameters():
                yield

    def metrics(self) -> dict[str, float]:
        """Return what the concept file records about the training."""
        metrics = {"loss": self.mean_loss} if math.isfinite(self.mean_loss) else {}
        if self._config.output.keep == "best" and self.best:
            metrics |= {"best_step": self.best["step"], **self.best["scores"]}
        return metrics

    def _named_parameters(self) -> Mapping[str, Sequence[Tensor]]:
        parts = {part: [*parameters] for part, parameters in self._live.trained.items()}
        return parts | {"token": [*self._live.embeddings]}

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "step": self.step,
            "mean_loss": self.mean_loss,
            "parameters": [parameter.detach() for parameter in self._live.parameters()],
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "averages": self._ema and self._ema.values,
            "precision": self._precision.state(),
            "best": self.best,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`."""
        self.step, self.mean_loss = state["step"], state["mean_loss"]
        self.best = state["best"] or {}  # None in checkpoints of earlier versions
        set_parameters(self._live.parameters(), state["parameters"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._precision.load(state["precision"])
        if self._ema:
            set_parameters(self._ema.values, state["averages"])


def _sum(losses: Mapping[str, Tensor]) -> Tensor:
    first, *others = losses.values()
    return sum(others, first)


def batch_seed(seed: int, number: int) -> int:
    """Return the seed of a training's batch of this number."""
    return (seed * 1_000_003 + number) % 2**63
