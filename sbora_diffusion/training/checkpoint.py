"""A training's folder: who it belongs to, how far it got, and a lock, so that nothing is lost or done twice."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion import __version__
from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.masks import mask_file
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.aliases import with_current_names
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.locks import folder_held

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def describe_run(
    concept: Concept, base: Base, interval: Interval | None, config: TrainConfig, num_processes: int
) -> dict[str, Any]:
    """What must be the same for a training to be resumed: JSON values only."""
    together: dict[str, Any] = {"processes": num_processes} if num_processes > 1 else {}
    files = [mask_file(image.path) for image in concept.images]
    if any(files) and (config.loss.masked_loss or config.loss.attention_weight):
        together["masks"] = _digest(file.read_bytes() if file else b"" for file in files)
    return together | {
        "concept": {"name": concept.name, "token": concept.token, "class_noun": concept.class_noun},
        "images": image_digest(concept),
        "base": base.id,
        "fingerprint": base.fingerprint,
        "interval": str(interval),
        "config": config.to_dict(),
    }


def image_digest(concept: Concept) -> str:
    """16 hexadecimal digits of all images' bytes and captions."""
    return _digest(image.path.read_bytes() + image.caption.encode() for image in concept.images)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """This package, Python, the libraries below it and, in a checkout, the commit."""
    found = {"sbora-diffusion": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in LIBRARIES}
    commit = _git_commit()
    return found | ({"git": commit} if commit else {})


def _git_commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RunFolder:
    """The checkpoint and the description of one training, and its lock.

    Args:
        writes: whether this process looks after it; what other processes of the training do to it has no effect.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self._checkpoint = path / CHECKPOINT

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this process; the operating system lets go of it when the process dies."""
        if not self._writes:
            yield
            return
        with folder_held(self.path, "training", "wait for it to end"):
            yield

    def start(self, description: dict[str, Any], resume: bool, anew: bool = False) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a new training; to be called while the folder is claimed.

        Args:
            anew: a checkpoint that lies here is deleted.

        Raises:
            SboraError: an unfinished training lies here and is neither to be resumed nor deleted, or it is another one.
        """
        if anew:
            self.finish()
        found = self._checkpoint.exists()
        if found and not resume:
            raise SboraError(
                f"an interrupted training lies in {self.path}",
                "add --resume to go on with it, or --force to start anew",
            )
        if found:
            return self._load(description)
        self._write("run.json", json.dumps(description | {"versions": versions()}, indent=2).encode())
        return None

    def _load(self, description: dict[str, Any]) -> dict[str, Any]:
        try:
            state = torch.load(self._checkpoint, weights_only=True)
            before = with_current_names(json.loads(state["run"]))
            before["config"] = with_current_names(before["config"])
        except Exception as error:  # torch.load raises anything at all on a damaged file
            raise SboraError(f"cannot read {self._checkpoint}: {error}", "start anew with --force") from error
        changed = _differences(before, description)
        if changed:
            raise SboraError(
                f"the interrupted training in {self.path} differs in {', '.join(changed)}",
                "repeat its settings (run.json has them), or start anew with --force",
            )
        return state

    def save(self, description: dict[str, Any], state: dict[str, Any]) -> None:
        """Store a checkpoint; a kill at any moment leaves this one or the one before."""
        if not self._writes:
            return
        partial = self._checkpoint.with_suffix(".partial")
        try:
            torch.save(state | {"run": json.dumps(description)}, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self._checkpoint)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            partial.unlink(missing_ok=True)
            raise SboraError(f"cannot write {self._checkpoint}: {error}", "free disk space, then --resume") from error

    def finish(self) -> None:
        """The training is complete: there is nothing to resume."""
        if self._writes:
            self._checkpoint.unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        partial = self.path / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(self.path / name)


def append_log(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a step to a run folder's log, a line of JSON; the first step of a training begins the file anew.

    Args:
        entry: "step", counted from 1, and whatever else is to be told of it, in JSON values.
    """
    with (folder / LOG).open("w" if entry["step"] == 1 else "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """A training's steps so far, each once: those that a resumed training repeated are told as they were last.

    A line that is being written at this moment is left out.
    """
    steps = {}
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entry = with_current_names(json.loads(line))
            steps[entry["step"]] = entry
        except (ValueError, TypeError, KeyError):
            continue
    return [steps[step] for step in sorted(steps)]


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key} ({old} there, {new} here)")
    return changed
