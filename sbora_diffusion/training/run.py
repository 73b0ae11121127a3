"""One training from start to end: prepare, train step by step, save the result."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sbora_diffusion.adapters.basis import FORMAT, FORMAT_OF_METHODS, Interval, Spec
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.inference.generate import check_captions, check_tokens
from sbora_diffusion.methods.live import InjectedConcept, injected_concept
from sbora_diffusion.methods.registry import find_method, method_side
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import current
from sbora_diffusion.models.layerwise_tokens import cross_attentions
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import RunFolder, StepLog, describe_run, image_digest, versions
from sbora_diffusion.training.preview import Preview
from sbora_diffusion.training.trainer import Trainer

log = logging.getLogger(__name__)

OnStep = Callable[[StepLog], None]
Score = Callable[[], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The trained adapter, its file and its image of before and after."""

    adapter: Adapter
    path: Path | None  # None: not saved, or saved by another process
    before_after: Path


def run_training(
    concept: Concept,
    base: Base,
    interval: Interval | None,
    config: TrainConfig,
    run_folder: Path,
    *,
    save_to: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    score: Score | None = None,
) -> TrainingResult:
    """Train a concept into columns (or rows) `interval` of every adapted layer; None for methods that own none.

    The base model is restored at the end, also after an error. Every step's random numbers come from `config.seed` and
    the step's number, so a resumed training gives the same adapter, bit for bit. With several processes of
    torch.distributed each calls this alike; the main one writes files and calls `on_step`.

    Args:
        run_folder: where checkpoints, log and previews are written.
        save_to: the concept file; the checkpoint is deleted after it is written.
        resume: continue from the checkpoint in the run folder, if there is one.
        overwrite: replace an existing concept file, and without `resume` an interrupted training in the run folder.
        on_step: called after every step.
        score: rates the base model's images of the concept at this moment by "overall" and perhaps more; called every
            `config.output.eval_every` steps and at the end.

    Raises:
        SboraError: a folder that is in use or holds another training, a loss that is not finite, a method that cannot
            train sharded weights, a caption or prompt so long that its token is cut off.
    """
    processes = current()
    find_method(config.method.name).check_sharding(processes.sharded)
    folder = RunFolder(run_folder, processes.is_first)
    description = describe_run(concept, base, interval, config, processes.count)
    with folder.claimed():
        state = processes.broadcast_from_main(lambda: folder.start(description, resume, overwrite and not resume))
        preview = Preview(base, concept, config, run_folder, processes.is_first)
        preview.generate_before()
        data = prepare_data(concept, base, config)
        with injected_concept(concept, base, interval, config) as live:
            check_captions(base, concept.images)
            check_tokens(base, preview.named)
            trainer = Trainer(live, data, config, base, processes)
            if state is not None:
                trainer.load(state)
            for step in range(trainer.step, config.optim.steps):
                loss = trainer.train_step(step)
                scores, validation = _evaluate(trainer, config, score)
                if _is_due(trainer, config.output.save_every, config):
                    folder.save(description, trainer.state())
                image = _preview(trainer, preview, config)
                entry = _step_log(trainer, config, base, loss, image, scores, validation)
                folder.log(entry)
                if on_step and processes.is_first:
                    on_step(entry)
            with trainer.result_parameters():
                before_after, drift = preview.generate_after()
                metrics = trainer.metrics() | {"class_drift": drift}
                adapter = _adapter(concept, base, interval, config, live, metrics)
        path = _save(adapter, save_to, overwrite, run_folder) if save_to and processes.is_first else None
        folder.finish(_step_log(trainer, config, base, trainer.mean_loss, before_after))
    return TrainingResult(adapter=adapter, path=path, before_after=before_after)


def _evaluate(
    trainer: Trainer, config: TrainConfig, score: Score | None
) -> tuple[Mapping[str, float] | None, float | None]:
    """Return the images' scores and the validation loss if they are due; the trainer stores its best step."""
    scores = validation = None
    output = config.output
    if score and _is_due(trainer, output.eval_every, config, at_end=True):
        with trainer.eval_parameters():
            scores = score()
        trainer.update_best(scores)
    if config.data.validation_images and _is_due(trainer, output.validation_every, config, at_end=True):
        validation = trainer.validate()
        if not output.eval_every:
            trainer.update_best({"overall": -validation, "validation_loss": validation})
    return scores, validation


def _preview(trainer: Trainer, preview: Preview, config: TrainConfig) -> Path | None:
    if not _is_due(trainer, config.output.preview_every, config):
        return None
    with trainer.eval_parameters():
        return preview.generate(trainer.step)


def _is_due(trainer: Trainer, every: int, config: TrainConfig, at_end: bool = False) -> bool:
    if trainer.step == config.optim.steps:
        return at_end and every > 0
    return every > 0 and trainer.step % every == 0


def _step_log(
    trainer: Trainer,
    config: TrainConfig,
    base: Base,
    loss: float,
    image: Path | None,
    scores: Mapping[str, float] | None = None,
    validation: float | None = None,
) -> StepLog:
    return StepLog(
        step=trainer.step,
        steps=config.optim.steps,
        loss=loss,
        learning_rate=trainer.learning_rate,
        samples_per_second=trainer.samples_per_second,
        memory_bytes=memory_bytes(base.device),
        preview=image,
        scores=scores,
        validation=validation,
    )


def memory_bytes(device: torch.device) -> int:
    """Return this process's resident memory on the CPU, or the peak of torch's allocations on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _save(adapter: Adapter, path: Path, overwrite: bool, run_folder: Path) -> Path:
    """Save without overwriting a file that was created during the training; return the path."""
    if overwrite or not path.exists():
        adapter.save(path, force=overwrite)
        return path
    other = run_folder / path.name
    adapter.save(other, force=True)
    log.warning("%s was created during training and was not overwritten; the result is in %s", path, other)
    return other


def _adapter(
    concept: Concept,
    base: Base,
    interval: Interval | None,
    config: TrainConfig,
    live: InjectedConcept,
    metrics: dict[str, float],
) -> Adapter:
    factors, dense, embeddings = live.learned()
    is_plain = config.method.name in ("sbora-fa", "sbora-fb") and not config.method.layerwise_tokens
    spec = Spec(
        name=concept.name,
        side=method_side(config.method.name),
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
