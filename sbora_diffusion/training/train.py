"""Train one concept by any method: weights in the denoiser's and the text encoders' attention, and its token."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.spec import FORMAT, FORMAT_OF_METHODS, Spec
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.inference.generate import check_tokens
from sbora_diffusion.methods.live import InjectedConcept, injected_concept
from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import current
from sbora_diffusion.models.layerwise_tokens import cross_attentions
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import RunFolder, describe_run, image_digest, versions
from sbora_diffusion.training.preview import Preview
from sbora_diffusion.training.trainer import Run


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
    scores: Mapping[str, float] | None = None
    validation: float | None = None  # the loss on held-out images
    adapter: Adapter | None = None
    before_after: Path | None = None


def train(
    concept: Concept,
    base: Base,
    interval: Interval | None,
    config: TrainConfig,
    run_folder: Path,
    resume: bool = False,
    score: Callable[[], Mapping[str, float]] | None = None,
    anew: bool = False,
) -> Iterator[StepLog]:
    """Train a concept into columns (or rows) `interval` of every adapted layer; None for methods that own none.

    The base model is as it was when the iterator ends or is closed. Every step's random numbers come from
    `config.seed` and the step's number, so a resumed training gives the same adapter, bit for bit.

    Where torch.distributed has brought several processes together, each calls this alike and gets the same logs; the
    first one alone writes files. The batch is `config.data.batch_size` in each of them.

    Args:
        score: how good the base model's images of the concept are at this moment, the higher "overall" the better;
            asked every `config.output.eval_every` steps and at the end.
        anew: what an interrupted training has left in the folder goes.

    Raises:
        SboraError: a folder in use or with another training in it, a loss that is not finite, a method that cannot be
            trained in shares, a caption or preview prompt so long that the text encoder does not read its token.
    """
    processes = current()
    find_method(config.method.name).check_sharding(processes.sharded)
    folder = RunFolder(run_folder, processes.is_first)
    description = describe_run(concept, base, interval, config, processes.count)
    with folder.claimed():
        state = processes.broadcast_from_main(lambda: folder.start(description, resume, anew))
        preview = Preview(base, concept, config, run_folder, processes.is_first)
        preview.generate_before()
        data = prepare_data(concept, base, config)
        with injected_concept(concept, base, interval, config) as live:
            check_tokens(base, [*(image.caption for image in concept.images), *preview.named])
            run = Run(live, data, config, base, processes)
            if state is not None:
                run.load(state)
            for step in range(run.step, config.optim.steps):
                loss = run.advance(step)
                done = step + 1
                scores, validation = _judge(run, done, config, score)
                if done % config.output.save_every == 0 and done < config.optim.steps:
                    folder.save(description, run.state())
                image = _shown(run, preview, done) if _is_shown(done, config) else None
                yield _log(run, config, base, loss=loss, preview=image, scores=scores, validation=validation)
            metrics = {"loss": run.mean_loss} if math.isfinite(run.mean_loss) else {}
            if config.output.keep == "best" and run.best:
                run.restore_best(run.best)
                metrics |= {"best_step": run.best.step, **run.best.scores}
            with nullcontext() if config.output.keep == "best" and run.best else run.eval_parameters():
                before_after, metrics["class_drift"] = preview.generate_after()
                adapter = _result(concept, base, interval, config, live, metrics)
        yield _log(run, config, base, loss=run.mean_loss, adapter=adapter, before_after=before_after)
        folder.finish()


def _judge(
    run: Run, done: int, config: TrainConfig, score: Callable[[], Mapping[str, float]] | None
) -> tuple[Mapping[str, float] | None, float | None]:
    """The images' scores and the validation loss after a step, if they are due; the run remembers its best."""
    scores = validation = None
    if score and _is_due(done, config.output.eval_every, config.optim.steps):
        with run.eval_parameters():
            scores = score()
        run.rate(scores)
    if config.data.validation_images and _is_due(done, config.output.validation_every, config.optim.steps):
        validation = run.validate()
        if not config.output.eval_every:
            run.rate({"overall": -validation, "validation_loss": validation})
    return scores, validation


def _is_due(done: int, every: int, steps: int) -> bool:
    return every > 0 and (done % every == 0 or done == steps)


def _is_shown(done: int, config: TrainConfig) -> bool:
    """Not at the end, where there is the sheet of before and after."""
    return config.output.preview_every > 0 and done % config.output.preview_every == 0 and done < config.optim.steps


def _shown(run: Run, preview: Preview, done: int) -> Path:
    with run.eval_parameters():
        return preview.generate(done)


def _log(run: Run, config: TrainConfig, base: Base, **told: Any) -> StepLog:
    """What there is to tell of a training as it stands, and what else is known."""
    return StepLog(
        step=run.step,
        steps=config.optim.steps,
        learning_rate=run.learning_rate,
        samples_per_second=run.samples_per_second,
        memory_bytes=memory_bytes(base.device),
        **told,
    )


def memory_bytes(device: torch.device) -> int:
    """Resident memory of this process on the CPU; the peak of what torch allocated on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _result(
    concept: Concept,
    base: Base,
    interval: Interval | None,
    config: TrainConfig,
    live: InjectedConcept,
    metrics: dict[str, float],
) -> Adapter:
    factors, dense, embeddings = live.learned()
    method = find_method(config.method.name)
    is_plain = method.file_format == FORMAT and not config.method.layerwise_tokens
    spec = Spec(
        name=concept.name,
        side=method.side,
        rank=config.method.rank,
        intervals=(interval,) if interval else (),
        seed=config.method.basis_seed,
        base_id=base.id,
        base_fingerprint=base.fingerprint,
        tokens={concept.token: concept.class_noun},
        recipe=config.to_dict() | {"images": image_digest(concept)},
        versions=versions(),
        metrics=metrics,
        format=FORMAT if is_plain else FORMAT_OF_METHODS,
        method="" if is_plain else config.method.name,
        embedding_layers=len(cross_attentions(base)) if config.method.layerwise_tokens else 0,
    )
    tokens = {f"{component}.{concept.token}": rows for component, rows in embeddings.items()}
    return Adapter(spec, factors, tokens, dense)
