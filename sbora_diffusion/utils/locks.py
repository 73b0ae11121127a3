"""One process at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sbora_diffusion.utils.errors import SboraError

LOCK = ".lock"


@contextmanager
def folder_held(folder: Path, what: str, hint: str) -> Iterator[None]:
    """Hold a folder, made if it is not there; the operating system lets go of it when the process dies.

    Args:
        what: is going on there, such as "training".
        hint: what to do while another process holds it.

    Raises:
        SboraError: another process holds it.
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
