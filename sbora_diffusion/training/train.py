"""Train a concept and save it in the library: the function behind `sbora.train` and the train command."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept, concept_name, default_roots, load_concept
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library
from sbora_diffusion.methods.registry import configure, find_method, method_side
from sbora_diffusion.models.base import Base, load_base, load_unplaced
from sbora_diffusion.models.distributed import joined
from sbora_diffusion.models.loading import find_kind
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import CHECKPOINT
from sbora_diffusion.training.memory import GIGABYTE, activations, advice, available, estimate, is_out_of_memory
from sbora_diffusion.training.run import OnStep, Score, TrainingResult, run_training
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_description
from sbora_diffusion.utils.text import command_line

log = logging.getLogger(__name__)

SCORER = "sbora_diffusion.evaluation.quick:make_scorer"  # by name, because evaluation builds on training


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to train and where to store it."""

    concept: str | Path | Concept  # a name, a folder, or a loaded concept
    base: str | Base = "emoji64"
    method: str = "sbora-fa"
    interval: str | Interval | None = None  # None: the first free one
    settings: Mapping[str, Any] = field(default_factory=dict)  # that differ from the recipe
    library: Library = field(default_factory=lambda: Library("adapters"))
    runs: Path = Path("runs")
    resume: bool = False
    overwrite: bool = False


class TrainingInterrupted(KeyboardInterrupt):
    """A training that was stopped; with a checkpoint, `resume=True` continues it."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder, self.has_checkpoint = run_folder, (run_folder / CHECKPOINT).exists()
        super().__init__(
            f"stopped; the last checkpoint is kept in {run_folder}, resume=True continues from it"
            if self.has_checkpoint
            else "stopped before the first checkpoint"
        )


def train(
    concept: str | Path | Concept,
    base: str | Base = "emoji64",
    *,
    method: str = "sbora-fa",
    library: str | Path | Library = "adapters",
    runs: str | Path = "runs",
    interval: str | Interval | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    settings: Mapping[str, Any] | None = None,
    **more_settings: Any,
) -> Adapter:
    """Train a concept and save it in the library as NAME.safetensors.

        train("concepts/dog", base="emoji64", rank=8, steps=100, on_step=print)

    Args:
        concept: the name of a concept that ships with the package, a folder of images, or a loaded concept.
        base: emoji64, a short name such as sdxl, a folder, a checkpoint file, a hub id, or a loaded base model.
        method: such as sbora-fa, sbora-fb, lora.
        library: the folder of concept files.
        runs: the folder of run folders, which hold checkpoint, log and previews.
        interval: the columns to own, such as "8:16"; None for the first free ones.
        resume: continue an interrupted training of this concept.
        overwrite: replace an existing concept file or interrupted training.
        on_step: called after every step.
        settings, more_settings: any settings of the recipe (docs/training.md), as values or as texts.

    Raises:
        SboraError: an unknown concept, base model, method or setting, a value that is not allowed, an existing file.
        TrainingInterrupted: Ctrl-C.
    """
    request = Request(
        concept=concept,
        base=base,
        method=method,
        interval=interval,
        settings={**(settings or {}), **more_settings},
        library=library if isinstance(library, Library) else Library(library),
        runs=Path(runs),
        resume=resume,
        overwrite=overwrite,
    )
    return train_concept(request, on_step).adapter


def train_concept(request: Request, on_step: OnStep | None = None) -> TrainingResult:
    """Train what is requested and save it; see `train`.

    With several processes (torchrun, accelerate launch) the main one reads the request, reserves columns and saves.
    """
    library = request.library
    with joined() as processes:
        find_method(request.method).check_sharding(processes.sharded)  # before a large base model is loaded for nothing
        if not processes.is_first:
            logging.getLogger("sbora_diffusion").setLevel(logging.ERROR)
        concept, config, pinned = processes.broadcast_from_main(lambda: _read(request))
        run_folder = request.runs / concept.name
        if isinstance(request.base, Base):
            base = request.base
        else:
            load = partial(load_base, request.base, config.model.precision, processes.sharded)
            base = processes.sequentially(load) if processes.sharded else load()
        interval = processes.broadcast_from_main(
            lambda: _reserve(concept, base, config, library, pinned or _resumed_interval(request, run_folder))
        )
        kept = activations(base, config)
        needed, limit = estimate(base, config, kept), available(base.device)
        log.info("memory: %s needed, %.1f GB available", needed, limit / GIGABYTE)
        if needed.total > limit:
            log.warning("the memory may not suffice: %s", advice(base, config, kept))
        try:
            return run_training(
                concept,
                base,
                interval,
                config,
                run_folder,
                save_to=library.path(concept.name),
                confirm=lambda: library.confirm(concept.name),
                resume=request.resume,
                overwrite=request.overwrite,
                on_step=on_step,
                score=_scorer(base, concept, config),
            )
        except KeyboardInterrupt:
            raise TrainingInterrupted(run_folder) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SboraError(f"out of memory: this training needs {needed}", advice(base, config, kept)) from error
        finally:
            if processes.is_first:
                library.release(concept.name)


def _read(request: Request) -> tuple[Concept, TrainConfig, Interval | None]:
    """Check a request as far as possible without the base model."""
    settings = {key: _as_text(value) for key, value in request.settings.items()}
    if isinstance(request.base, Base):
        kind, precision = request.base.kind, request.base.precision
        if settings.setdefault("precision", precision) != precision:
            raise SboraError(f"got precision={settings['precision']}, but the base model was loaded in {precision}")
    else:
        kind = find_kind(request.base)
    config = configure(kind, request.method, settings)
    interval = Interval.parse(request.interval) if isinstance(request.interval, str) else request.interval
    concept = request.concept
    if not isinstance(concept, Concept):
        concept = load_concept(str(concept), default_roots())
    path = request.library.path(concept.name)
    if path.exists() and not request.overwrite:
        raise SboraError(f"{path} exists", hint="Give the concept another name, or overwrite it with --force.")
    log.info("concept %s: %d images in %s", concept.token, len(concept.images), concept.images[0].path.parent)
    return concept, config, interval


def _resumed_interval(request: Request, run_folder: Path) -> Interval | None:
    """Return the interval of the interrupted training that will be resumed, if it owns one."""
    if not (request.resume and (run_folder / CHECKPOINT).exists()):
        return None
    interval = read_description(run_folder).get("interval")
    return Interval.parse(interval) if interval not in (None, "None") else None


def _reserve(
    concept: Concept, base: Base, config: TrainConfig, library: Library, pinned: Interval | None
) -> Interval | None:
    """Reserve an interval until the training ends; return None if its method owns none."""
    if find_method(config.method.name).owns_interval:
        return library.reserve(space_of(base, config), config.method.rank, concept.name, pinned)
    library.check_not_in_training(concept.name)
    if pinned:
        raise SboraError(f"got --interval {pinned}, but {config.method.name} owns no columns")
    return None


def space_of(base: Base, config: TrainConfig) -> Space:
    """Return the columns (fa) or rows (fb) of a base model that the ledger allocates to a training."""
    side, seed = method_side(config.method.name), config.method.basis_seed
    return Space(base_id=base.id, base_fingerprint=base.fingerprint, side=side, seed=seed, widths=base.widths(side))


def reserve_interval(name: str, base_name: str, method: str, rank: int, pinned: str, *, library: Library) -> Interval:
    """Reserve an interval for a concept that will be trained later, here or elsewhere."""
    if name != (valid := concept_name(name)):
        raise SboraError(f"got {name!r}, which is no concept's name", f"reserve {valid or 'a word'}")
    if not find_method(method).owns_interval:
        raise SboraError(f"{method} owns no columns", "train without a reservation")
    config = configure(find_kind(base_name), method, {"rank": str(rank)})
    space = space_of(load_unplaced(base_name), config)
    interval = library.reserve(space, rank, name, Interval.parse(pinned) if pinned else None, lasting=True)
    command = command_line("train", "--concept", name, "--base", base_name, "--method", method, "--rank", interval.rank)
    log.info("next: %s; elsewhere with --interval %s", command, interval)
    return interval


def _as_text(value: Any) -> str:
    """Return a setting's value as `--set` takes it."""
    return ";".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _scorer(base: Base, concept: Concept, config: TrainConfig) -> Score | None:
    return resolve_name(SCORER)(base, concept, config) if config.output.eval_every else None
