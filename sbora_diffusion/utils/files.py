"""Write files and folders atomically: readers see the previous state or the complete new one."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sbora_diffusion.utils.errors import SboraError

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_file(
    path: Path, content: bytes | Callable[[BinaryIO], object], *, overwrite: bool = False, hint: str | None = None
) -> None:
    """Write a file atomically and durably; missing folders are created.

    The content goes to a temporary file in the same folder, which is removed if anything fails, Ctrl-C included.

    Args:
        content: the bytes, or a function that writes them to an open file, such as `partial(torch.save, state)`.
        overwrite: replace an existing file.
        hint: what to do if the file cannot be written.

    Raises:
        FileExistsError: the file exists and `overwrite` is false.
        SboraError: the file cannot be written, for example because the disk is full.
    """
    is_new = True
    with _errors_of(path, hint):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(path, content) as temporary:
            if overwrite:
                temporary.replace(path)
            else:
                is_new = _link(temporary, path)
        _sync_folder(path.parent)
    if not is_new:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def check_writable(path: Path) -> None:
    """Raise SboraError if a file cannot be written here: to be called before hours of work for it."""
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with _temporary_file(path, b""):
            pass


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary path for a folder's content; on success it replaces the folder, on failure it is removed.

    Raises:
        SboraError: the folder cannot be written, for example because the disk is full; an existing one is kept.
    """
    target = folder.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _errors_of(folder):
            yield temporary
            _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically, in place of an existing one: `write_file(path, content, overwrite=True)`."""
    write_file(path, content, overwrite=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet; raise FileExistsError or another OSError otherwise."""
    with _temporary_file(path, content) as temporary:
        if not _link(temporary, path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextmanager
def _errors_of(path: Path, hint: str | None = None) -> Iterator[None]:
    """Report operating system errors, also those that torch and safetensors wrap, as SboraError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save on a full disk
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise SboraError(f"cannot write {path} ({reason})", hint) from None


@contextmanager
def _temporary_file(path: Path, content: bytes | Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Yield a file with this content, safely on the disk, in the same folder; it is removed at the end."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give a file a second name; return False if that name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _copy(temporary, path)
    return True


def _copy(temporary: Path, path: Path) -> bool:
    """Do the same on disks without hard links (memory cards); readers can see the file while it is being written."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(temporary.read_bytes())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
    return True


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Move a folder into place; for a moment there is neither the old nor the new one."""
    if not folder.exists():
        temporary.replace(folder)
        return
    old = folder.with_name(f"{temporary.name}.old")
    folder.replace(old)
    try:
        temporary.replace(folder)
    except BaseException:
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows has no such call."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
