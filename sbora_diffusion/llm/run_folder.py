"""The run folder of a fine-tuning: what decided it, its checkpoints and, at the end, its result."""

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from sbora_diffusion.adapters.basis import Interval, Spec
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.layer import collect
from sbora_diffusion.library.library import Library
from sbora_diffusion.llm.base import COMPONENT
from sbora_diffusion.llm.config import LlmConfig, side_of
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import differences, read_description, read_json, versions, write_file

log = logging.getLogger(__name__)

LOSSES = "losses.json"
ADAPTER = "adapter"  # the PEFT directory in a run folder
ABOUT = "sbora.json"  # in a PEFT directory of ours: what it was trained on, and how
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors")
_CONTENTS = {"data_sha256": "the content of the data", "fingerprint": "the base model's weights"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained on what; with an `LlmConfig` it decides the result.

    Attributes:
        interval: of an SBoRA adapter; None until one is reserved.
        data_sha256: of the data file; like the base model's fingerprint "" until it has been read.
    """

    base: str
    data: Path
    method: str
    quantize: str
    interval: Interval | None = None
    data_sha256: str = ""
    fingerprint: str = ""

    def describe(self, config: LlmConfig) -> dict[str, Any]:
        """Return everything that decides the training, in JSON values."""
        interval = str(self.interval) if self.interval else None
        return asdict(self) | {"data": str(self.data), "interval": interval, "config": config.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The files that a training wrote."""

    adapter: Path  # a PEFT directory
    concept: Path | None  # the concept file of an SBoRA adapter
    in_library: Path | None  # its copy in the library


def is_first_process() -> bool:
    """Return whether this is the only process, or the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def find_checkpoint(run: Run, config: LlmConfig, folder: Path, resume: bool) -> tuple[Run, Path | None]:
    """Return the run, with the interval that it had before, and the checkpoint to resume from, if there is one.

    Raises:
        SboraError: the folder holds another training, or one and `resume` is false.
    """
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last and not resume:
        raise SboraError(f"{folder} contains a training", "resume it with --resume, or choose another --out")
    if (folder / ADAPTER).is_dir() and not last:
        raise SboraError(f"{folder} contains a finished training", "choose another --out, or delete the folder")
    if not resume:
        return run, None
    if not last:
        log.warning("there is no checkpoint in %s: the training begins anew", folder)
    interval = read_description(folder).get("interval")
    if interval and not run.interval:
        run = replace(run, interval=Interval.parse(interval))
    check_same(run, config, folder)
    return run, _last_whole_checkpoint(folder)


def check_same(run: Run, config: LlmConfig, folder: Path) -> None:
    """Raise SboraError if the folder holds another training; what has not been read yet is not compared."""
    before = read_description(folder)
    now = {key: value for key, value in run.describe(config).items() if before and value != ""}
    old, new = ({_CONTENTS.get(key, key): one.get(key) for key in now} for one in (before, now))
    changed = differences(old, new)
    if changed:
        raise SboraError(
            f"the training in {folder} differs in {', '.join(changed)}", "repeat its settings, or choose another --out"
        )


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint that is complete and undamaged."""
    found = {
        int(path.name.partition("-")[2]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()
    }
    for _, path in sorted(found.items(), reverse=True):
        defect = _defect(path)
        if not defect:
            return path
        log.warning("%s is skipped: %s", path, defect)
    return None


def _defect(checkpoint: Path) -> str:
    """Return why a checkpoint cannot be read, or ""; the Trainer writes its state last."""
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
        for path in checkpoint.rglob("*"):
            if path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif path.suffix in (".pt", ".pth") and not is_zipfile(path):
                return f"{path.name} is damaged"
    except (OSError, ValueError, SboraError, SafetensorError) as error:
        return str(error)
    return ""


def save_result(
    model: Any, run: Run, config: LlmConfig, folder: Path, metrics: dict[str, float], library: Library | None
) -> Trained:
    """Write the PEFT directory of a trained model and, for SBoRA, a concept file, also into the library."""
    out, concept = folder / ADAPTER, folder / f"{folder.resolve().name}.safetensors"
    model.save_pretrained(str(out))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    about = run.describe(config) | {"parameters": trained, "metrics": metrics, "versions": versions(LIBRARIES)}
    write_file(out / ABOUT, json.dumps(about, indent=2).encode(), overwrite=True)
    side = side_of(run.method)
    if side is None or run.interval is None:
        return Trained(adapter=out, concept=None, in_library=None)
    spec = Spec(
        side=side,
        rank=config.method.rank,
        intervals=(run.interval,),
        seed=config.method.basis_seed,
        base_id=run.base,
        base_fingerprint=run.fingerprint,
        tokens={},
        name=concept.stem,
        recipe=config.to_dict() | {"data": str(run.data), "data_sha256": run.data_sha256, "quantize": run.quantize},
        versions=versions(LIBRARIES),
        metrics={"parameters": trained},
    )
    adapter = Adapter(spec, collect(model, "default", COMPONENT), {})
    adapter.save(concept, force=True)
    if library:
        library.confirm(concept.stem)
        adapter.save(library.path(concept.stem), force=True)
    return Trained(adapter=out, concept=concept, in_library=library and library.path(concept.stem))
