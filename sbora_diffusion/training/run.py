"""One training from start to end: prepare, train step by step, generate previews, save the result."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from sbora_diffusion.adapters.basis import FORMAT, FORMAT_OF_METHODS, Interval, Spec
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.batches import prepare_data
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.inference.generate import check_captions, check_tokens, generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.methods.live import InjectedConcept, injected_concept
from sbora_diffusion.methods.registry import find_method, method_side
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import current
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import RunFolder, StepLog, describe_run, image_digest, versions
from sbora_diffusion.training.trainer import Trainer
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import say_plainly

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
    confirm: Callable[[], None] = lambda: None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    score: Score | None = None,
) -> TrainingResult:
    """Train a concept into columns (fb: rows) `interval` of every adapted layer; None for methods that own none.

    The base model is restored at the end, also after an error. Every step's random numbers come from `config.seed` and
    the step's number, so that a resumed training is bitwise identical. Each of several processes calls this alike.

    Args:
        run_folder: for checkpoints, log and previews.
        save_to: the concept file; the checkpoint is deleted after it is written.
        confirm: raises SboraError if the interval is no longer this training's; the run folder gets the result then.
        resume: continue from the run folder's checkpoint, if there is one.
        overwrite: replace an existing concept file and, without `resume`, an interrupted training.
        on_step: called after every step, in the main process.
        score: scores of the base model's current images, "overall" among them; for `config.output.eval_every`.

    Raises:
        SboraError: a folder in use or of another training, a loss that is not finite, a token that a caption cuts off.
    """
    processes = current()
    find_method(config.method.name).check_sharding(processes.sharded)
    folder = RunFolder(run_folder, processes.is_first)
    description = describe_run(concept, base, interval, config, processes.count)
    with folder.claimed():
        state = processes.broadcast_from_main(lambda: folder.start(description, resume, overwrite and not resume))
        preview = Preview(base, concept, config, run_folder, processes.is_first)
        data = prepare_data(concept, base, config)
        with injected_concept(concept, base, interval, config) as live:
            check_captions(base, concept.images)
            check_tokens(base, preview.prompts)
            trainer = Trainer(live, data, config, base, processes)
            if state is not None:
                trainer.load(state)
            for step in range(trainer.step, config.optim.steps):
                loss = trainer.train_step(step)
                evaluated = _evaluate(trainer, preview, config, score)
                if _is_due(trainer, config.output.save_every):
                    folder.save(description, trainer.state())
                entry = _step_log(trainer, base, loss, **evaluated)
                folder.log(entry)
                if on_step and processes.is_first:
                    on_step(entry)
            with trainer.result_parameters():
                before_after, drift = preview.generate_after()
                adapter = _adapter(concept, base, interval, config, live, trainer.metrics() | {"class_drift": drift})
        path = _save(adapter, save_to, overwrite, run_folder, confirm) if save_to and processes.is_first else None
        folder.finish(_step_log(trainer, base, trainer.mean_loss, preview=before_after))
    return TrainingResult(adapter=adapter, path=path, before_after=before_after)


def _evaluate(trainer: Trainer, preview: "Preview", config: TrainConfig, score: Score | None) -> dict[str, Any]:
    """Return scores, validation loss and preview if they are due; the trainer stores its best step."""
    evaluated: dict[str, Any] = {}
    if score and _is_due(trainer, config.output.eval_every, at_end=True):
        with trainer.eval_parameters():
            evaluated["scores"] = score()
        trainer.update_best(evaluated["scores"])
    if config.data.validation_images and _is_due(trainer, config.output.validation_every, at_end=True):
        evaluated["validation"] = loss = trainer.validate()
        if not config.output.eval_every:
            trainer.update_best({"overall": -loss, "validation_loss": loss})
    if _is_due(trainer, config.output.preview_every):
        with trainer.eval_parameters():
            evaluated["preview"] = preview.generate(trainer.step)
    return evaluated


def _is_due(trainer: Trainer, every: int, at_end: bool = False) -> bool:
    if trainer.step == trainer.num_steps:
        return at_end and every > 0
    return every > 0 and trainer.step % every == 0


def _step_log(trainer: Trainer, base: Base, loss: float, **evaluated: Any) -> StepLog:
    return StepLog(
        step=trainer.step,
        steps=trainer.num_steps,
        loss=loss,
        learning_rate=trainer.learning_rate,
        samples_per_second=trainer.samples_per_second,
        memory_bytes=memory_bytes(base.device),
        **evaluated,
    )


def memory_bytes(device: torch.device) -> int:
    """Return this process's resident memory on the CPU, or the peak of torch's allocations on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


class Preview:
    """Images of the preview prompts, generated with the same seeds each time.

    Args:
        writes: whether this process writes the files; all of several processes generate the images.

    Attributes:
        prompts: with the concept's token.
    """

    def __init__(self, base: Base, concept: Concept, config: TrainConfig, folder: Path, writes: bool = True) -> None:
        self._base, self._concept, self._config, self._folder, self._writes = base, concept, config, folder, writes
        self.prompts = [prompt.replace("{token}", concept.token) for prompt in config.output.preview_prompts]
        self._plain_prompts = [say_plainly(prompt, concept.token, concept.class_noun) for prompt in self.prompts]
        self._before = self._images(self._plain_prompts)

    def generate(self, step: int) -> Path:
        """Write a grid of images with the token, and return its path."""
        title = f"{self._concept.token} after {step} steps"
        return self._save(f"preview-{step:06d}.png", [(title, self._images(self.prompts))])

    def generate_after(self) -> tuple[Path, float]:
        """Write the comparison of before and after; measure the drift of the class noun.

        Returns:
            The path, and the mean absolute difference of the pixels of images without the token, from 0 to 1.
        """
        after = self._images(self._plain_prompts)
        pixels = [[np.asarray(image, float) for _, image in images] for images in (self._before, after)]
        drift = float(np.mean([np.abs(one - other).mean() / 255 for one, other in zip(*pixels, strict=True)]))
        rows = [
            ("reference images", [(image.caption, load_image(image.path)) for image in self._concept.images[:5]]),
            (f"before: {self._base.id}'s own {self._concept.class_noun}", self._before),
            (f"after: {self._concept.token}", self._images(self.prompts)),
            (f"after, without the token (pixels moved by {drift:.1%})", after),
        ]
        return self._save("before-after.png", rows), drift

    def _images(self, prompts: Sequence[str]) -> list[tuple[str, Image.Image]]:
        """Generate an image of each prompt, with the prompt as its label."""
        seeds, output = [self._config.seed + number for number in range(len(prompts))], self._config.output
        images = generate(self._base, prompts, seeds=seeds, steps=output.sampling_steps, guidance=output.guidance)
        return list(zip(prompts, images, strict=True))

    def _save(self, name: str, rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> Path:
        path = self._folder / name
        if self._writes:
            sheet(rows).save(path)
        return path


def _save(adapter: Adapter, path: Path, overwrite: bool, run_folder: Path, confirm: Callable[[], None]) -> Path:
    """Save; into the run folder if the file was created during the training or its columns are others' now."""
    try:
        confirm()
        if path.exists() and not overwrite:
            raise SboraError(f"{path} was created during training and was not overwritten")
    except SboraError as reason:
        other = run_folder / path.name
        adapter.save(other, force=True)
        log.warning("%s; the result is in %s", reason, other)
        return other
    adapter.save(path, force=overwrite)
    return path


def _adapter(
    concept: Concept,
    base: Base,
    interval: Interval | None,
    config: TrainConfig,
    live: InjectedConcept,
    metrics: dict[str, float],
) -> Adapter:
    factors, dense, embeddings = live.learned()
    embedding_layers = 0
    if config.method.layerwise_tokens:
        from sbora_diffusion.models.layerwise_tokens import cross_attentions

        embedding_layers = len(cross_attentions(base))
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
        embedding_layers=embedding_layers,
    )
    tokens = {f"{component}.{concept.token}": rows for component, rows in embeddings.items()}
    return Adapter(spec, factors, tokens, dense)
