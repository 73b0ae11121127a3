"""Locks on folders: one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sbora_diffusion.utils.errors import SboraError

LOCK = ".lock"


@contextmanager
def folder_held(folder: Path, what: str, hint: str) -> Iterator[None]:
    """Lock a folder, created if missing; the operating system releases the lock when the process dies.

    Args:
        what: the activity that needs the folder, such as "training", for the error.
        hint: what to do if another process holds the lock.

    Raises:
        SboraError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SboraError(f"another {what} is running in {folder}", hint) from None
    try:
        yield
    finally:
        lock.release()
