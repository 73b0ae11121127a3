"""A training under way: what it learns from, its optimiser, one step after the other, and the state to resume it."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.diffusion.base import Base
from sbora_diffusion.diffusion.concept import Concept
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.erasure import Erasure
from sbora_diffusion.diffusion.families.noising import Noising
from sbora_diffusion.diffusion.latents import Batch, answers, draw_latents, encode
from sbora_diffusion.diffusion.live import Live
from sbora_diffusion.diffusion.moments import recorded_inputs
from sbora_diffusion.diffusion.quiet import Loudness
from sbora_diffusion.english import say_plainly
from sbora_diffusion.errors import SboraError

PRIOR_SIZE = 192  # answers of the base model that are held


@dataclass(frozen=True, eq=False)
class Data:
    """The encoded pictures with their captions, and the base model's answers that are to hold."""

    latents: Tensor
    captions: list[str]
    prior: Batch
    noising: Noising
    moments: dict[str, Tensor]  # of the adapted layers' inputs on the prior prompts


def prepare_data(concept: Concept, base: Base, config: TrainConfig) -> Data:
    """Encode the pictures and ask the untouched base model for the answers that training holds in place.

    Half of them ("prior prediction") are to the concept's pictures under the captions of its class, so that the class
    stays what it was; half to the base model's own pictures of the prior prompts, so that the adapter is quiet on
    everything else, other concepts' pictures included.
    """
    latents, captions = encode(base, concept, config)
    noising, generator = base.family.noising(base.pipeline), torch.Generator().manual_seed(config.seed)
    said = [say_plainly(caption, concept.token, concept.class_noun) for caption in captions]
    prior = answers(base, latents, base.tokenize(said), noising, PRIOR_SIZE // 2, generator)
    if not config.prior_prompts:
        return Data(latents, captions, prior, noising, {})
    drawn, ids = draw_latents(base, config.prior_prompts, config), base.tokenize(config.prior_prompts)
    with recorded_inputs(base) as moments:
        others = answers(base, drawn, ids, noising, PRIOR_SIZE // 2, generator)
    return Data(latents, captions, prior + others, noising, moments.means())


@dataclass(frozen=True, eq=False)
class Scored:
    """What was learned up to a step, and how good its pictures are."""

    step: int
    scores: dict[str, float]
    parameters: list[Tensor]


class Run:
    """The optimiser and the data of a training, at some step."""

    def __init__(self, live: Live, data: Data, config: TrainConfig, base: Base) -> None:
        self.step, self.mean_loss, self.samples_per_second = 0, float("nan"), 0.0
        self.best: Scored | None = None
        self._live, self._data, self._config, self._base = live, data, config, base
        self._ids = base.tokenize(data.captions)
        self._empty = base.tokenize([""])
        self._loudness = Loudness(base, live.layers, data.moments) if data.moments and config.quiet_weight else None
        self._erasure = Erasure(base, live.layers) if config.erasure_weight else None
        groups: list[dict[str, Any]] = [
            {
                "params": parameters,
                "lr": config.learning_rate if part == base.family.denoiser else config.text_encoder_learning_rate,
            }
            for part, parameters in live.trained.items()
        ]
        groups.append({"params": live.embeddings, "lr": config.token_learning_rate})
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: rate_factor(step, config))

    @property
    def learning_rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    def advance(self, step: int) -> tuple[float, float]:
        """One optimiser step; returns the loss on the concept and the seconds taken."""
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + step)
        batch, prior = self._concept_batch(generator), self._prior_batch(generator)
        both = [torch.cat(parts) for parts in zip(batch, prior, strict=True)]
        with self._erasure.recording(len(prior[0])) if self._erasure else nullcontext():
            error = (self._base.predict(both[0], both[1], both[2]) - both[3]).pow(2).flatten(1).mean(1)
        own, held = error.split([len(batch[0]), len(prior[0])])
        loss = own.mean() + self._config.prior_weight * held.sum() / max(1, len(held))
        if self._loudness:
            loss = loss + self._config.quiet_weight * self._loudness()
        if self._erasure:
            loss = loss + self._config.erasure_weight * self._erasure()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._live.parameters(), self._config.max_grad_norm)
        value = own.mean().item()
        if not torch.isfinite(loss):
            raise SboraError(
                f"the loss is {value} at step {step + 1}", "train with a lower rate: --set learning_rate=1e-3"
            )
        self._optimizer.step()
        self._schedule.step()
        self.step = step + 1
        seconds = time.perf_counter() - began
        self.mean_loss = value if step == 0 else 0.98 * self.mean_loss + 0.02 * value
        self.samples_per_second = self._config.batch_size / seconds
        return value, seconds

    def rate(self, scores: Mapping[str, float]) -> None:
        """Remember what is learned now if no step before scored as high; "overall" decides."""
        if self.best is None or scores["overall"] > self.best.scores["overall"]:
            self.best = Scored(self.step, dict(scores), [p.detach().clone() for p in self._live.parameters()])

    def go_back_to(self, scored: Scored) -> None:
        """Take up what was learned up to an earlier step."""
        self._set_parameters(scored.parameters)

    def _concept_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, ids and targets of random crops of the pictures."""
        count, device = self._config.batch_size, self._base.device
        rows = torch.randint(len(self._data.latents), (count,), generator=generator)
        latents = self._data.latents[rows]
        t = self._data.noising.timesteps(count, generator).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        dropped = torch.rand(count, 1, generator=generator) < self._config.caption_dropout
        ids = torch.where(dropped.to(device), self._empty, self._ids[rows])
        noising = self._data.noising
        return noising.add(latents, noise, t), t, ids, noising.target(latents, noise, t)

    def _prior_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prior = self._data.prior
        rows = torch.randint(len(prior.t), (self._config.prior_batch,), generator=generator)
        return prior.noisy[rows], prior.t[rows], prior.ids[rows], prior.target[rows]

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "step": self.step,
            "mean_loss": self.mean_loss,
            "parameters": [parameter.detach() for parameter in self._live.parameters()],
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "best": self.best and vars(self.best),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.step, self.mean_loss = state["step"], state["mean_loss"]
        self.best = state["best"] and Scored(**state["best"])
        self._set_parameters(state["parameters"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    @torch.no_grad()
    def _set_parameters(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._live.parameters(), values, strict=True):
            parameter.copy_(value)


def rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a straight line down to `final_rate` at the last step."""
    decayed = 1 - (1 - config.final_rate) * step / config.steps
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * decayed
