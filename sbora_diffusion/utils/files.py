"""Files that are there whole, or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sbora_diffusion.utils.errors import SboraError

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file: whoever looks sees the old one or the whole new one.

    Raises:
        SboraError: it cannot be written, such as on a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path, content) as temporary:
            temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise SboraError(f"cannot write {path} ({error.strerror or error})") from None


def check_writable(path: Path) -> None:
    """Before hours of work for a file: raise SboraError if nothing can be written where it will lie."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with _beside(path, b""):
            pass
    except OSError as error:
        raise SboraError(f"cannot write {path} ({error.strerror or error})") from None


def write_new(path: Path, content: bytes) -> None:
    """A new file, whole from the start; where a disk has no hard links, it can be seen while it is written.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written; nothing stays behind.
    """
    with _beside(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _write_in_place(path, content)


def _write_in_place(path: Path, content: bytes) -> None:
    """On a memory card, or another place that has no hard links."""
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:
            path.unlink()
            raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A path beside a folder's to write the folder at; at the end it takes its place, and that of what is there.

    Raises:
        SboraError: it cannot be written, for one because the disk is full; then what was there is left.
    """
    place = folder.resolve()
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _put_in_place(temporary, place)
    except (OSError, SafetensorError) as error:
        raise SboraError(f"cannot write {folder} ({getattr(error, 'strerror', None) or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Whoever looks sees the old folder, for a moment none, then the whole new one."""
    old = folder.with_name(f"{temporary.name}.old")
    if folder.exists():
        folder.replace(old)
    temporary.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _beside(path: Path, content: bytes) -> Iterator[Path]:
    """Meanwhile the content lies on the disk in the same folder, under a name that nobody looks for."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Windows has no such call."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
