"""The progress bar of `merge` while the base model is sampled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def sampling_progress() -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr, from the first sample on."""
    with Progress(console=Console(stderr=True)) as bar:
        tasks = []

        def update(done: int, total: int) -> None:
            if not tasks:
                tasks.append(bar.add_task("sampling concepts", total=total))
            bar.update(tasks[0], completed=done)

        yield update
