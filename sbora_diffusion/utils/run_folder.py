"""What run folders of all trainings share: a lock, the description in run.json, and its comparison for a resume."""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sbora_diffusion import __version__
from sbora_diffusion.utils.aliases import with_current_names
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import folder_held, write_atomically

RUN = "run.json"  # everything that decided the training
_FULL_DISK = (
    "No space left",
    "unexpected pos",
    "file write failed",
    "iostream error",
)  # torch's and safetensors' words


def claimed(folder: Path, writes: bool = True, hint: str = "wait for it to end") -> AbstractContextManager[None]:
    """Hold a run folder for this process; the operating system releases it when the process dies.

    Args:
        writes: False in processes that leave the folder to another one; they hold nothing.

    Raises:
        SboraError: another process holds it.
    """
    return folder_held(folder, "training", hint) if writes else nullcontext()


def write_description(folder: Path, description: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Write everything that decides a training, in JSON values, and the versions that it was made with."""
    write_atomically(folder / RUN, json.dumps({**description, "versions": dict(versions)}, indent=2).encode())


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description in a run folder under current names, {} if there is none.

    Raises:
        SboraError: the file is damaged.
    """
    path = folder / RUN
    try:
        described = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SboraError(f"cannot read {path} ({error})", "start anew in another folder") from None
    if not isinstance(described, dict):
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
    commit = _git_commit()
    return found | ({"git": commit} if commit else {})


@contextmanager
def full_disk_reported(folder: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise on a full disk into a one-line error; other errors pass."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _FULL_DISK):
            raise
        raise SboraError(f"cannot write in {folder}: no space left", "free disk space, then --resume") from error


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
