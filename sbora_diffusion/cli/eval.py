"""Progress of the eval command on stderr."""

import logging
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class EvaluationProgress:
    """A progress bar on stderr while images are generated; if stderr is no terminal, a log entry for each tenth."""

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
        self._logged = -1  # tenths

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """Show the number of images so far, and of all."""
        state = "scoring" if done == total else "generating images"
        if not self._progress.tasks[0].started:
            self._progress.reset(self._task, total=total, completed=done)  # a resumed one starts in the middle
        self._progress.update(self._task, completed=done, description=state)
        if not self._is_terminal and done * 10 // total > self._logged:
            self._logged = done * 10 // total
            log.info("%d of %d images", done, total)
