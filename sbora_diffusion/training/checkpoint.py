"""A run folder: the checkpoint, log and description of one training, and a lock."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.folder import mask_file
from sbora_diffusion.models.base import Base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils import files
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import with_current_names

log = logging.getLogger(__name__)

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """The state of a training after a step."""

    step: int  # steps done
    steps: int
    loss: float
    learning_rate: float
    samples_per_second: float
    memory_bytes: int  # resident on the CPU, or the peak allocated on the GPU
    preview: Path | None = None
    scores: Mapping[str, float] | None = None
    validation: float | None = None  # the loss on held-out images


def describe_run(
    concept: Concept, base: Base, interval: Interval | None, config: TrainConfig, num_processes: int
) -> dict[str, Any]:
    """Return what must stay the same for a training to be resumed, as JSON values."""
    optional: dict[str, Any] = {"processes": num_processes} if num_processes > 1 else {}
    masks = [mask_file(image.path) for image in concept.images]
    if any(masks) and (config.loss.masked_loss or config.loss.attention_weight):
        optional["masks"] = _digest(file.read_bytes() if file else b"" for file in masks)
    return optional | {
        "concept": {"name": concept.name, "token": concept.token, "class_noun": concept.class_noun},
        "images": image_digest(concept),
        "base": base.id,
        "fingerprint": base.fingerprint,
        "interval": str(interval),
        "config": config.to_dict(),
    }


def image_digest(concept: Concept) -> str:
    """Return 16 hexadecimal digits of the digest of all images' bytes and captions."""
    return _digest(image.path.read_bytes() + image.caption.encode() for image in concept.images)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, the main libraries and, in a checkout, the commit."""
    return files.versions(LIBRARIES)


class RunFolder:
    """The checkpoint, log and description of one training, and its lock.

    Args:
        writes: whether this process writes; for the other processes of a training every method does nothing.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        self._checkpoint = path / CHECKPOINT

    def claimed(self) -> AbstractContextManager[None]:
        """Lock the folder; the operating system releases the lock when the process dies."""
        return files.claimed(self.path, self._writes)

    def start(self, description: dict[str, Any], resume: bool, discard: bool = False) -> dict[str, Any] | None:
        """Return the checkpoint to resume from, or None for a new training; call it while the folder is claimed.

        Args:
            discard: delete an existing checkpoint.

        Raises:
            SboraError: the checkpoint is neither to be resumed nor discarded, is damaged or of another training.
        """
        if discard:
            self._checkpoint.unlink(missing_ok=True)
        found = self._checkpoint.exists()
        if found and not resume:
            raise SboraError(
                f"an interrupted training lies in {self.path}",
                "continue it with --resume, or start over with --force",
            )
        if found:
            return self._load(description)
        if resume and self._writes:
            log.warning("there is no checkpoint in %s: the training begins anew", self.path)
        files.write_description(self.path, description, versions())
        return None

    def _load(self, description: dict[str, Any]) -> dict[str, Any]:
        try:
            state = torch.load(self._checkpoint, weights_only=True)
            before = with_current_names(json.loads(state["run"]))
            before["config"] = with_current_names(before["config"])
        except Exception as error:  # torch.load raises anything at all on a damaged file
            raise SboraError(f"cannot read {self._checkpoint}: {error}", "start over with --force") from error
        changed = files.differences(before, description)
        if changed:
            raise SboraError(
                f"the interrupted training in {self.path} differs in {', '.join(changed)}",
                "repeat its settings (they are in run.json), or start over with --force",
            )
        return state

    def save(self, description: dict[str, Any], state: dict[str, Any]) -> None:
        """Replace the checkpoint; if the process is killed meanwhile, the previous one is left."""
        if not self._writes:
            return
        content = partial(torch.save, state | {"run": json.dumps(description)})
        files.write_file(self._checkpoint, content, overwrite=True, hint="free disk space, then --resume")

    def log(self, entry: StepLog, done: bool = False) -> None:
        """Add a step to the log file."""
        if not self._writes:
            return
        values = {key: getattr(entry, key) for key in ("step", "steps", "loss", "samples_per_second", "validation")}
        scores = dict(entry.scores) if entry.scores else None
        image = entry.preview.name if entry.preview else None
        append_log(self.path, values | {"time": time.time(), "scores": scores, "image": image, "done": done})

    def finish(self, entry: StepLog) -> None:
        """Log that the training is complete and delete its checkpoint."""
        self.log(entry, done=True)
        if self._writes:
            self._checkpoint.unlink(missing_ok=True)


def append_log(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append a step to a run folder's log as a line of JSON; the first step of a training replaces the file.

    Args:
        entry: "step", counted from 1, and any other JSON values.
    """
    with (folder / LOG).open("w" if entry["step"] == 1 else "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return a training's steps so far, each once: of steps that a resumed training repeated, the last entry.

    A half-written line is left out.
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
