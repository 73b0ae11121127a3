"""The eval command: concept files in, images and their scores out; progress on stderr."""

import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sbora_diffusion.data.concept import Concept, default_roots, known_concepts, load_concept
from sbora_diffusion.evaluation.encoders import load_encoder, load_vision
from sbora_diffusion.evaluation.evaluate import BATCH, evaluate
from sbora_diffusion.evaluation.report import write_report
from sbora_diffusion.evaluation.suite import load_suite
from sbora_diffusion.evaluation.tables import summary
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import load_base
from sbora_diffusion.models.loading import is_emoji64

log = logging.getLogger(__name__)

SEEDS = 4  # images of each prompt


def evaluate_concepts(
    names: Sequence[str],
    merged_name: str,
    suite_name: str,
    encoder_name: str,
    concept_names: Sequence[str],
    base_name: str,
    settings: Mapping[str, Any],
    *,
    library: Library,
    evaluations: Path,
    out: Path | None,
    force: bool,
) -> tuple[str, list[Path]]:
    """Evaluate concepts by the names of their adapters; the table of scores, and the paths of the report.

    Args:
        suite_name, encoder_name: "" for what suits the base model.
        concept_names: concepts besides the known ones, by name or by their images' folder.
        settings: seeds, batch_size, vision, and the fields of `Sampling`.
        evaluations: where folders of evaluations lie, for the one that `out` does not name.
    """
    sampled = dict(settings)
    seeds, batch_size = sampled.pop("seeds", SEEDS), sampled.pop("batch_size", BATCH)
    vision_name = sampled.pop("vision", "")
    adapters = [library.load(name) for name in names]
    merged = library.load(merged_name) if merged_name else None
    base_name = base_name or adapters[0].spec.base_id
    default_suite, default_encoder = _defaults(base_name)
    suite = load_suite(suite_name or default_suite)
    parts = [adapter.spec.name for adapter in adapters] + ([f"in-{Path(merged_name).stem}"] if merged else [])
    folder = out or evaluations / "-".join([*parts, suite.name])
    command = shlex.join(["sbora-diffusion", *sys.argv[1:]])
    try:
        with EvaluationProgress() as progress:
            base = load_base(base_name, "")
            report = evaluate(
                base,
                adapters,
                suite,
                _concepts(concept_names),
                load_encoder(encoder_name or default_encoder),
                range(seeds),
                folder,
                merged=merged,
                vision=load_vision(vision_name) if vision_name else None,
                sampling=replace(base.sampling, **sampled),
                batch_size=batch_size,
                force=force,
                on_image=progress.show,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what was made is kept in {folder}, go on with: {command}") from None
    report = replace(report, about=report.about | {"command": command})
    return summary(report), write_report(report, folder)


class EvaluationProgress:
    """A bar on stderr while images are made; a line now and then where stderr is no terminal."""

    def __init__(self) -> None:
        self._is_terminal = Console(stderr=True).is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True, quiet=not self._is_terminal),
            expand=True,
        )
        self._task = self._progress.add_task("loading", total=None, start=False)
        self._told = -1  # tenths

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """How many images there are."""
        state = "judging" if done == total else "making images"
        if not self._progress.tasks[0].started:
            self._progress.reset(self._task, total=total, completed=done)  # a resumed one starts in the middle
        self._progress.update(self._task, completed=done, description=state)
        if not self._is_terminal and done * 10 // total > self._told:
            self._told = done * 10 // total
            log.info("%d of %d images", done, total)


def _defaults(base_name: str) -> tuple[str, str]:
    """Suite and encoder for a base model: emoji64 knows its own small world only."""
    return ("emoji64", "emoji-clip") if is_emoji64(base_name) else ("objects", "openai/clip-vit-base-patch32")


def _concepts(extra: Iterable[str]) -> list[Concept]:
    """All known concepts, and those that the user names, which take the place of known ones of their name."""
    with _hushed("sbora_diffusion.data.concept"):
        known = [load_concept(name, default_roots()) for name in known_concepts(default_roots())]
    named = [load_concept(name, default_roots()) for name in extra]
    return list({concept.name: concept for concept in [*known, *named]}.values())


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    """A logger that would say the same of every concept."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
