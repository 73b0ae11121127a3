"""Locks of running trainings: the operating system ends them with the process, in any container and by any clock."""

from pathlib import Path

from filelock import FileLock, Timeout

from sbora_diffusion.adapters.basis import check_file_name
from sbora_diffusion.utils.errors import SboraError

PROBED = 5  # seconds; others hold a lock for microseconds, to see whether it is free


class TrainingLocks:
    """One lock file per concept name, `<name>.lock`, in a folder that is created with the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def acquire(self, name: str) -> FileLock:
        """Lock a name until the lock is released or its process ends.

        Raises:
            SboraError: another training holds it.
        """
        lock = self._lock(name)
        self._folder.mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=PROBED)
        except Timeout:
            raise SboraError(f"{name} is being trained by another process", "wait for it to end, or stop it") from None
        return lock

    def is_held(self, name: str) -> bool:
        """Return whether a training holds the lock of a name; assumed where that cannot be known."""
        try:
            with self._lock(name):
                return False
        except FileNotFoundError:  # no training has locked anything here
            return False
        except (Timeout, OSError):
            return True

    def _lock(self, name: str) -> FileLock:
        check_file_name(name)
        return FileLock(self._folder / f"{name}.lock", timeout=0)
