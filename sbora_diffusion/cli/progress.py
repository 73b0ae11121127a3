"""Progress on stderr: a bar in a terminal, log lines now and then elsewhere."""

import logging
import os
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from sbora_diffusion.training.checkpoint import StepLog

log = logging.getLogger(__name__)


class _Bar:
    """A bar on stderr, shown only if that is a terminal."""

    def __init__(self, description: str, total: int | None = None) -> None:
        self.is_terminal = Console(stderr=True).is_terminal
        is_main_process = os.environ.get("RANK", "0") == "0"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True, quiet=not (self.is_terminal and is_main_process)),
            expand=True,
        )
        self._task = self._progress.add_task(description, total=total, start=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int, description: str) -> None:
        if not self._progress.tasks[0].started:
            self._progress.reset(self._task, total=total, completed=done)  # what is resumed starts in the middle
        self._progress.update(self._task, completed=done, description=description)


class TrainingProgress(_Bar):
    """The progress of a training: `show` each step."""

    def __init__(self) -> None:
        super().__init__("preparing")

    def show(self, step: "StepLog") -> None:
        state = f"loss {step.loss:.3f}  {step.samples_per_second:.1f} images/s  {step.memory_bytes / 1e9:.1f} GB"
        self.update(step.step, step.steps, state)
        if not self.is_terminal and step.step % max(1, step.steps // 10) == 0:
            log.info("step %d/%d  %s", step.step, step.steps, state)
        if step.scores:
            scores = "  ".join(f"{name} {value:.3f}" for name, value in step.scores.items())
            log.info("step %d/%d  %s", step.step, step.steps, scores)
        if step.preview:
            log.info("preview: %s", step.preview)


class EvaluationProgress(_Bar):
    """The progress of an evaluation: `show` the number of images."""

    def __init__(self) -> None:
        super().__init__("loading")
        self._logged_tenths = -1

    def show(self, done: int, total: int) -> None:
        self.update(done, total, "scoring" if done == total else "generating images")
        if not self.is_terminal and done * 10 // total > self._logged_tenths:
            self._logged_tenths = done * 10 // total
            log.info("%d of %d images", done, total)


class MergeProgress(_Bar):
    """The progress of a merge that samples from the base model: shown with the first sample."""

    def __init__(self) -> None:
        super().__init__("sampling")

    def __enter__(self) -> Self:
        return self

    def show(self, done: int, total: int) -> None:
        self._progress.start()
        self.update(done, total, "sampling what to preserve")
