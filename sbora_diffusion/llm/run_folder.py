"""The folder of a fine-tuning: what decided it, its checkpoints, and at the end what it learned."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from sbora_diffusion import __version__
from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.layer import collect
from sbora_diffusion.adapters.spec import Spec
from sbora_diffusion.llm.base import COMPONENT
from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.methods.registry import method_side
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import write_atomically
from sbora_diffusion.utils.locks import folder_held

log = logging.getLogger(__name__)

RUN = "run.json"  # in a run folder: everything that decided the training
LOSSES = "losses.json"
ADAPTER = "adapter"  # the PEFT directory in it
ABOUT = "sbora.json"  # in a PEFT directory of ours: what it was trained on, and how
_FULL_DISK = ("No space left", "unexpected pos", "file write failed", "iostream error")
_CONTENTS = {"data_sha256": "what is in the data", "fingerprint": "the base model's weights"}
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained on what: with `LlmConfig` everything that decides the result."""

    base: str
    data: Path
    method: str
    quantize: str
    interval: Interval | None = None  # of an SBoRA adapter; before the training None is whatever is free
    data_sha256: str = ""  # of the file; like the base model's fingerprint "" until it has been read
    fingerprint: str = ""

    def to_dict(self) -> dict[str, str | None]:
        told = {"base": self.base, "data": str(self.data), "method": self.method, "quantize": self.quantize}
        told |= {"data_sha256": self.data_sha256, "fingerprint": self.fingerprint}
        return told | {"interval": str(self.interval) if self.interval else None}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training wrote."""

    adapter: Path  # a PEFT directory
    concept: Path | None  # the concept file of an SBoRA adapter


def is_first_process() -> bool:
    """Of those that torchrun or accelerate started; also the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process, or for the first of several; the system lets go when the process dies."""
    if not is_first_process():
        yield
        return
    with folder_held(folder, "training", "wait for it to end, or choose another --out"):
        yield


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """What torch and safetensors make of a full disk, in a line."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(sign in str(error) for sign in _FULL_DISK):
            raise
        raise SboraError(f"cannot write in {folder}: no space left", "make room, then go on with --resume") from error


def check(run: Run, config: LlmConfig, folder: Path, resume: bool) -> tuple[Run, str | None]:
    """The training, with the columns that it had before if it had, and the checkpoint to go on from, or None.

    Raises:
        SboraError: the folder holds another training, or one and `resume` is false.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last and not resume:
        raise SboraError(f"a training lies in {folder}", "add --resume to go on with it, or choose another --out")
    before = _described(folder / RUN) if resume else {}
    if before.get("interval") and not run.interval:
        run = replace(run, interval=Interval.parse(before["interval"]))
    if resume:
        check_same(run, config, folder)
    return run, _last_whole(folder) if resume else None


def check_same(run: Run, config: LlmConfig, folder: Path) -> None:
    """Raise SboraError if the folder holds another training; what has not been read yet is not compared."""
    before, described = _described(folder / RUN), _describe(run, config)
    changed = [key for key, value in described.items() if before and value != "" and before.get(key) != value]
    if changed:
        names = ", ".join(_CONTENTS.get(key, key) for key in changed)
        raise SboraError(f"the training in {folder} differs in {names}", "repeat its settings, or choose another --out")


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was not interrupted while it was written, nor damaged since."""
    found = {
        int(path.name.partition("-")[2]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()
    }
    for _, path in sorted(found.items(), reverse=True):
        defect = _defect(path)
        if not defect:
            return str(path)
        log.warning("%s is left out: %s", path, defect)
    return None


def _defect(checkpoint: Path) -> str:
    """What keeps a checkpoint from being read, or nothing; the Trainer writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
        for path in checkpoint.rglob("*"):
            if path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif path.suffix in (".pt", ".pth") and not is_zipfile(path):
                return f"{path.name} is damaged"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return ""


def start(run: Run, config: LlmConfig, folder: Path) -> None:
    """Write down everything that decides the training."""
    write_atomically(folder / RUN, json.dumps(_describe(run, config), indent=2).encode())


def _describe(run: Run, config: LlmConfig) -> dict[str, Any]:
    return run.to_dict() | {"config": config.to_dict()}


def finish(model: Any, run: Run, config: LlmConfig, folder: Path, metrics: dict[str, float]) -> Trained:
    """Write what a trained PEFT model has learned: a PEFT directory and, of SBoRA, a concept file."""
    out = folder / ADAPTER
    model.save_pretrained(str(out))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    told = run.to_dict() | {"parameters": trained, "metrics": metrics, "versions": _versions()}
    write_atomically(out / ABOUT, json.dumps(told | {"config": config.to_dict()}, indent=2).encode())
    concept = folder / f"{folder.resolve().name}.safetensors"
    if run.interval is None:
        return Trained(adapter=out, concept=None)
    spec = Spec(
        side=method_side(run.method),
        rank=config.rank,
        intervals=(run.interval,),
        seed=config.basis_seed,
        base_id=run.base,
        base_fingerprint=run.fingerprint,
        tokens={},
        name=concept.stem,
        recipe=config.to_dict() | {"data": str(run.data), "data_sha256": run.data_sha256, "quantize": run.quantize},
        versions=_versions(),
        metrics={"parameters": trained},
    )
    Adapter(spec, collect(model, "default", COMPONENT), {}).save(concept, force=True)
    return Trained(adapter=out, concept=concept)


def _described(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SboraError(f"cannot read {path} ({error})", "choose another --out") from None
    if not isinstance(described, dict):
        raise SboraError(f"{path} does not describe a training", "choose another --out")
    return described


def _versions() -> dict[str, str]:
    return {"sbora-diffusion": __version__} | {name: version(name) for name in _LIBRARIES}
