"""The train command: a folder of images in, columns reserved, progress on stderr, a concept file out."""

import json
import logging
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.cli.render import TrainingProgress
from sbora_diffusion.data.concept import Concept, concept_name, default_roots, load_concept
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library
from sbora_diffusion.methods.registry import configure, find_method, method_side
from sbora_diffusion.models.base import Base, load_base, load_unplaced
from sbora_diffusion.models.distributed import joined, num_launched
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import CHECKPOINT, append_log
from sbora_diffusion.training.memory import (
    GIGABYTE,
    Activations,
    activations,
    advice,
    available,
    estimate,
    is_out_of_memory,
)
from sbora_diffusion.training.train import StepLog, train
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be trained, in a user's own words."""

    concept: str  # a name or a folder
    base: str
    method: str
    interval: str = ""  # pinned; empty: the first free one
    overrides: Mapping[str, str] = field(default_factory=dict)  # of the recipe
    force: bool = False  # in place of what there is


def train_concept(request: Request, *, library: Library, runs: Path, resume: bool = False) -> list[Path]:
    """Train a concept; the paths of what was written: the concept file and the image of before and after.

    Of several processes (torchrun, accelerate launch) the first one reads what is asked, reserves and writes.
    """
    with joined() as processes:
        find_method(request.method).check_sharding(processes.sharded)  # before a large base model is read for nothing
        if not processes.is_first:
            logging.getLogger("sbora_diffusion").setLevel(logging.ERROR)
        concept, config, wanted = processes.broadcast_from_main(lambda: _read(request, library))
        path, run = library.path(concept.name), runs / concept.name
        is_resumed = resume and (run / CHECKPOINT).exists()
        load = partial(load_base, request.base, config.model.precision, processes.sharded)
        base = processes.sequentially(load) if processes.sharded else load()
        interval = processes.broadcast_from_main(
            lambda: _reserve(concept, config, base, wanted or (_interval_of(run) if is_resumed else None), library)
        )
        kept = activations(base, config)
        _tell_memory(base, config, kept)
        score = _scorer(base, concept, config) if config.output.eval_every else None
        try:
            steps = train(concept, base, interval, config, run, resume, score, anew=request.force and not resume)
            if processes.is_first:
                return _write(steps, config, path, run, request.force)
            deque(steps, maxlen=0)
            return []
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_go_on(run) if processes.is_first else "") from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            needed = estimate(base, config, kept)
            raise SboraError(f"out of memory: this training needs {needed}", advice(base, config, kept)) from error
        finally:
            if processes.is_first:
                library.release(concept.name)


def _write(steps: Iterator[StepLog], config: TrainConfig, path: Path, run: Path, force: bool) -> list[Path]:
    """Go through a training, its progress on stderr; the paths of what was written."""
    written: list[Path] = []
    with TrainingProgress(config.optim.steps) as progress:
        for step in steps:
            progress.show(step)
            append_log(run, _told(step))
            if step.adapter and step.before_after:  # the run's checkpoint goes after this
                is_occupied = path.exists() and not force  # it was not there at the beginning
                if is_occupied:
                    log.warning("%s has come meanwhile, and stays; this one is in %s", path, run)
                    path = run / path.name
                step.adapter.save(path, force=force or is_occupied)
                written = [path, step.before_after]
                token = next(iter(step.adapter.spec.tokens))
                log.info(
                    'next: sbora-diffusion generate "a %s on the beach" --adapter %s',
                    token,
                    path if is_occupied else path.stem,
                )
    return written


def _read(request: Request, library: Library) -> tuple[Concept, TrainConfig, Interval | None]:
    """What a user asks for, checked as far as it can be without the base model."""
    config = configure(recipe_base(request.base), request.method, request.overrides)
    interval = Interval.parse(request.interval) if request.interval else None
    concept = load_concept(request.concept, default_roots())
    path = library.path(concept.name)
    if path.exists() and not request.force:
        raise SboraError(f"{path} exists", hint="Give the concept another name, or overwrite it with --force.")
    log.info("concept %s: %d images in %s", concept.token, len(concept.images), concept.images[0].path.parent)
    return concept, config, interval


def _reserve(
    concept: Concept, config: TrainConfig, base: Base, wanted: Interval | None, library: Library
) -> Interval | None:
    """The columns or rows that the concept gets; None if its method owns none."""
    if find_method(config.method.name).owns_interval:
        space = space_of(base, method_side(config.method.name), config.method.basis_seed)
        return library.reserve(space, config.method.rank, concept.name, wanted)
    library.check_not_in_training(concept.name)
    if wanted:
        raise SboraError(f"got --interval {wanted}, but {config.method.name} owns no columns")
    return None


def _tell_memory(base: Base, config: TrainConfig, kept: Activations) -> None:
    needed, there = estimate(base, config, kept), available(base.device)
    log.info("memory: %s besides the program itself; %.1f GB are there", needed, there / GIGABYTE)
    if needed.total > there:
        log.warning("that may be too much: %s", advice(base, config, kept))


def _told(step: StepLog) -> dict[str, Any]:
    """What the run folder's log keeps of a step."""
    told: dict[str, Any] = {"step": step.step, "steps": step.steps, "loss": step.loss, "time": time.time()}
    told |= {"samples_per_second": step.samples_per_second, "scores": dict(step.scores) if step.scores else None}
    told["validation"] = step.validation
    image = step.before_after or step.preview
    return told | {"image": image.name if image else None, "done": step.adapter is not None}


def reserve_interval(name: str, base_name: str, method: str, rank: int, pinned: str, *, library: Library) -> Interval:
    """Keep an interval for a concept that somebody will train later, here or elsewhere."""
    if name != (called := concept_name(name)):
        raise SboraError(f"got the name {name!r}, which no training gives", f"reserve {called or 'a word'}")
    if not find_method(method).owns_interval:
        raise SboraError(f"{method} owns no columns", "nothing is to be reserved: just train")
    config = configure(recipe_base(base_name), method, {"rank": str(rank)})
    wanted = Interval.parse(pinned) if pinned else None
    base = load_unplaced(base_name)
    space = space_of(base, method_side(method), config.method.basis_seed)
    interval = library.reserve(space, rank, name, wanted, lasting=True)
    log.info(
        "next: sbora-diffusion train --concept %s --base %s --method %s --rank %d; elsewhere with --interval %s",
        *(name, base_name, method, rank, interval),
    )
    return interval


def space_of(base: Base, side: Side, seed: int) -> Space:
    """The columns (fa) or rows (fb) of a base model that the ledger hands out."""
    return Space(base_id=base.id, base_fingerprint=base.fingerprint, side=side, seed=seed, widths=base.widths(side))


def _scorer(base: Base, concept: Concept, config: TrainConfig) -> Callable[[], dict[str, float]]:
    """Draws the preview prompts with two seeds and asks the encoder about them."""
    from sbora_diffusion.evaluation.judges.registry import load_judge
    from sbora_diffusion.evaluation.metrics.alignment import overall
    from sbora_diffusion.evaluation.run import quick_score
    from sbora_diffusion.models.families.base import Sampling

    encoder = load_judge(config.output.eval_encoder)
    prompts = [prompt.replace("{token}", concept.token) for prompt in config.output.preview_prompts]
    sampling = Sampling(steps=config.output.sampling_steps, guidance=config.output.guidance)

    def score() -> dict[str, float]:
        scores = quick_score(base, concept, encoder, prompts, (config.seed, config.seed + 1), sampling)
        kept = {"text": scores["text_cosine"], "image": scores["image"]}
        return kept | {"overall": overall(**kept)}

    return score


def _interval_of(run: Path) -> Interval | None:
    """The columns of the training in a run folder, if there was one."""
    try:
        said = json.loads((run / "run.json").read_bytes())["interval"]
        return None if said == "None" else Interval.parse(said)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise SboraError(f"cannot read {run / 'run.json'} ({error})", hint="Start anew with --force.") from None


def _how_to_go_on(run: Path) -> str:
    command = shlex.join(["sbora-diffusion", *(word for word in sys.argv[1:] if word != "--resume")])
    if num_launched() > 1:
        command = f"torchrun … -m sbora_diffusion {command.removeprefix('sbora-diffusion ')}"
    if (run / CHECKPOINT).exists():
        return f"stopped; the last checkpoint is kept in {run}, go on with: {command} --resume"
    return f"stopped before the first checkpoint, begin again with: {command}"
