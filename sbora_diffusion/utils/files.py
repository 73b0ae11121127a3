"""Atomic writes (readers see the previous state or the complete new one), and the run folder of a training."""

import errno
import json
import os
import platform
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sbora_diffusion import __version__
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import parse_json, with_current_names

LOCK = ".lock"
RUN = "run.json"  # everything that decided the training
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_FULL_DISK = ("No space left", "unexpected pos", "file write failed", "iostream error")  # of torch and safetensors


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


def check_regular(path: Path) -> None:
    """Raise OSError for a device, pipe or socket: opening one may never return."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))


def read_bytes(path: Path) -> bytes:
    """Return a regular file's content; anything else raises OSError."""
    check_regular(path)
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Return a JSON file's content; FileNotFoundError passes, any other defect raises SboraError."""
    try:
        return parse_json(read_bytes(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SboraError(f"cannot read {path} ({error})") from None


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


def claimed(folder: Path, writes: bool = True, hint: str = "wait for it to end") -> AbstractContextManager[None]:
    """Lock a run folder, as `folder_held` does, unless this process leaves the writing to another one."""
    return folder_held(folder, "training", hint) if writes else nullcontext()


def write_description(folder: Path, description: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Write everything that decides a training, in JSON values, and the versions that it was made with."""
    content = json.dumps({**description, "versions": dict(versions)}, indent=2).encode()
    write_file(folder / RUN, content, overwrite=True)


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description in a run folder under current names, {} if there is none.

    Raises:
        SboraError: the file is damaged.
    """
    path = folder / RUN
    try:
        described = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(described, dict) or not isinstance(described.get("config", {}), dict):
        raise SboraError(f"{path} does not describe a training", "start anew in another folder")
    current = with_current_names(described)
    return current | ({"config": with_current_names(current["config"])} if "config" in current else {})


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the keys in which two descriptions differ, with both values, such as "config.rank (4 there, 8 here)"."""
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key} ({old} there, {new} here)")
    return changed


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Return the versions of this package, Python, some libraries and, in a checkout, the commit."""
    found = {"sbora-diffusion": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in libraries}
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):
        found["git"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


@contextmanager
def full_disk_reported(folder: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise on a full disk into a one-line error; other errors pass."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _FULL_DISK):
            raise
        raise SboraError(f"cannot write in {folder}: no space left", "free disk space, then --resume") from error


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
            content(file) if callable(content) else file.write(content)
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
