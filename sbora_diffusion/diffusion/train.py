"""Train one concept: SBoRA adapters in the U-Net's and the text encoder's attention, and the concept's token."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sbora_diffusion.adapter.basis import Interval
from sbora_diffusion.adapter.file import Adapter, collect
from sbora_diffusion.adapter.layer import SboraLayer, attach
from sbora_diffusion.adapter.spec import Spec
from sbora_diffusion.diffusion.base import TARGETS, Base
from sbora_diffusion.diffusion.concept import Concept
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.latents import (
    Batch,
    Noising,
    encode,
    predict,
    prior_answers,
    stratified_timesteps,
    tokenize,
)
from sbora_diffusion.diffusion.preview import Preview
from sbora_diffusion.diffusion.run_folder import RunFolder, describe_run, picture_digest, versions
from sbora_diffusion.diffusion.tokens import TokenEmbedding, added_tokens, class_embedding
from sbora_diffusion.errors import SboraError
from sbora_diffusion.methods import lora_config, method_side

log = logging.getLogger(__name__)

ADAPTER = "concept"  # its name inside PEFT


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """What a training tells after each step; the last one carries the result."""

    step: int  # steps done
    steps: int
    loss: float
    learning_rate: float
    samples_per_second: float
    memory_bytes: int  # resident on the CPU, or allocated at most on the GPU
    preview: Path | None = None
    adapter: Adapter | None = None
    before_after: Path | None = None


def train(
    concept: Concept, base: Base, interval: Interval, config: TrainConfig, run_folder: Path, resume: bool = False
) -> Iterator[StepLog]:
    """Train a concept into columns (or rows) `interval` of every adapted layer.

    The base model is as it was when the iterator ends or is closed. Every step's random numbers come from
    `config.seed` and the step's number, so a resumed training gives the same adapter, bit for bit.

    Raises:
        SboraError: a folder in use or with another training in it, a loss that is not finite.
    """
    folder, description = RunFolder(run_folder), describe_run(concept, base, interval, config)
    with folder.claimed():
        state = folder.start(description, resume)
        preview = Preview(base, concept, config, run_folder)
        preview.draw_before()
        data = _prepare_data(concept, base, config)
        with _live_concept(concept, base, interval, config) as live:
            run = _Run(live, data, config, base)
            if state is not None:
                run.load(state)
            for step in range(run.step, config.steps):
                loss, seconds = run.advance(step)
                done = step + 1
                if done % config.save_every == 0 and done < config.steps:
                    folder.save(description, run.state())
                is_shown = config.preview_every and done % config.preview_every == 0 and done < config.steps
                yield StepLog(
                    step=done,
                    steps=config.steps,
                    loss=loss,
                    learning_rate=run.learning_rate,
                    samples_per_second=config.batch_size / seconds,
                    memory_bytes=memory_bytes(base.device),
                    preview=preview.draw(done) if is_shown else None,
                )
            before_after, drift = preview.draw_after()
            adapter = _result(concept, base, interval, config, live, {"loss": run.mean_loss, "class_drift": drift})
        yield StepLog(
            step=config.steps,
            steps=config.steps,
            loss=run.mean_loss,
            learning_rate=run.learning_rate,
            samples_per_second=run.samples_per_second,
            memory_bytes=memory_bytes(base.device),
            adapter=adapter,
            before_after=before_after,
        )
        folder.finish()


def memory_bytes(device: torch.device) -> int:
    """Resident memory of this process on the CPU; the peak of what torch allocated on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


@dataclass(frozen=True, eq=False)
class _Data:
    latents: Tensor
    captions: list[str]
    prior: Batch
    noising: Noising


def _prepare_data(concept: Concept, base: Base, config: TrainConfig) -> _Data:
    """Encode the pictures and ask the untouched base model for its answers."""
    latents, captions = encode(base, concept, config)
    noising = Noising(base)
    said = [caption.replace(concept.token, concept.class_noun) for caption in captions]
    prior = prior_answers(base, latents, tokenize(base, said), noising, config)
    return _Data(latents, captions, prior, noising)


@dataclass(frozen=True, eq=False)
class _Live:
    """The concept while it is being trained."""

    layers: dict[str, dict[str, SboraLayer]]  # component -> canonical layer -> layer
    embedding: TokenEmbedding

    def parameters(self) -> list[nn.Parameter]:
        trained = [layer.trained for layers in self.layers.values() for layer in layers.values()]
        return [*trained, self.embedding.learned]


@contextmanager
def _live_concept(concept: Concept, base: Base, interval: Interval, config: TrainConfig) -> Iterator[_Live]:
    """Inject the adapter, then the token (PEFT freezes all that is there when it injects); take both out at the end."""
    start = class_embedding(base, concept.class_noun)
    try:
        layers = {}
        for component, targets in TARGETS.items():
            model: Any = base.component(component)
            model.add_adapter(lora_config(config.rank, targets), adapter_name=ADAPTER)
            layers[component] = attach(model, ADAPTER, method_side(config.method), interval, config.basis_seed)
        with added_tokens(base, {concept.token: start}) as embedding:
            yield _Live(layers, embedding)
    finally:
        base.pipeline.unload_lora_weights()


class _Run:
    """The optimiser and the data of a training, at some step."""

    def __init__(self, live: _Live, data: _Data, config: TrainConfig, base: Base) -> None:
        self.step, self.mean_loss, self.samples_per_second = 0, float("nan"), 0.0
        self._live, self._data, self._config, self._base = live, data, config, base
        self._ids = tokenize(base, data.captions)
        self._empty = tokenize(base, [""])
        rates = {"unet": config.learning_rate, "text_encoder": config.text_encoder_learning_rate}
        groups: list[dict[str, Any]] = [
            {"params": [layer.trained for layer in layers.values()], "lr": rates[component]}
            for component, layers in live.layers.items()
        ]
        groups.append({"params": [live.embedding.learned], "lr": config.token_learning_rate})
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
        error = (predict(self._base, both[0], both[1], both[2]) - both[3]).pow(2).flatten(1).mean(1)
        own, held = error.split([len(batch[0]), len(prior[0])])
        loss = own.mean() + self._config.prior_weight * held.sum() / max(1, len(held))
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

    def _concept_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, ids and targets of random crops of the pictures."""
        count, device = self._config.batch_size, self._base.device
        rows = torch.randint(len(self._data.latents), (count,), generator=generator)
        latents = self._data.latents[rows]
        t = stratified_timesteps(count, self._data.noising.num_timesteps, generator).to(device)
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
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.step, self.mean_loss = state["step"], state["mean_loss"]
        for parameter, stored in zip(self._live.parameters(), state["parameters"], strict=True):
            parameter.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a straight line down to `final_rate` at the last step."""
    decayed = 1 - (1 - config.final_rate) * step / config.steps
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * decayed


def _result(
    concept: Concept, base: Base, interval: Interval, config: TrainConfig, live: _Live, metrics: dict[str, float]
) -> Adapter:
    factors = {}
    for component in TARGETS:
        factors |= collect(base.component(component), ADAPTER, component)
    learned = live.embedding.learned.detach().cpu().clone()
    spec = Spec(
        name=concept.name,
        side=method_side(config.method),
        rank=config.rank,
        intervals=(interval,),
        seed=config.basis_seed,
        base_id=base.id,
        base_fingerprint=base.fingerprint,
        tokens={concept.token: concept.class_noun},
        recipe=config.to_dict() | {"pictures": picture_digest(concept)},
        versions=versions(),
        metrics=metrics,
    )
    return Adapter(spec, factors, {f"text_encoder.{concept.token}": learned})
