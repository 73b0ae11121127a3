"""The folder of a fine-tuning: what decided it, its checkpoints, and at the end what it learned."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from sbora_diffusion import __version__
from sbora_diffusion.adapter.basis import Interval
from sbora_diffusion.adapter.file import Adapter, write_atomically
from sbora_diffusion.adapter.layer import collect
from sbora_diffusion.adapter.spec import Spec
from sbora_diffusion.errors import SboraError
from sbora_diffusion.llm.config import LlmConfig
from sbora_diffusion.methods import method_side

RUN = "run.json"  # in a run folder: everything that decided the training
LOSSES = "losses.json"
ADAPTER = "adapter"  # the PEFT directory in it
ABOUT = "sbora.json"  # in a PEFT directory of ours: what it was trained on, and how
COMPONENT = "model"  # what the concept file calls a language model
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained on what: with `LlmConfig` everything that decides the result."""

    base: str
    data: Path
    method: str
    quantize: str

    def to_dict(self) -> dict[str, str]:
        return {"base": self.base, "data": str(self.data), "method": self.method, "quantize": self.quantize}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training wrote."""

    adapter: Path  # a PEFT directory
    concept: Path | None  # the concept file of an SBoRA adapter


def claim(run: Run, config: LlmConfig, folder: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, or None; writes or compares the description of the training.

    Raises:
        SboraError: the folder holds another training, or one and `resume` is false.
    """
    described = run.to_dict() | {"config": config.to_dict()}
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    before = _described(folder / RUN)
    if last and not resume:
        raise SboraError(f"a training lies in {folder}", "add --resume to go on with it, or choose another --out")
    changed = [key for key in described if before and before.get(key) != described[key]]
    if resume and changed:
        raise SboraError(f"the training in {folder} differs in {', '.join(changed)}", "repeat its settings")
    write_atomically(folder / RUN, json.dumps(described, indent=2).encode())
    return last if resume else None


def finish(model: Any, run: Run, config: LlmConfig, folder: Path, identity: str, metrics: dict[str, float]) -> Trained:
    """Write what a trained PEFT model has learned: a PEFT directory and, of SBoRA, a concept file.

    Args:
        identity: the base model's fingerprint.
    """
    out = folder / ADAPTER
    model.save_pretrained(str(out))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    told = run.to_dict() | {"fingerprint": identity, "parameters": trained, "metrics": metrics, "versions": _versions()}
    write_atomically(out / ABOUT, json.dumps(told | {"config": config.to_dict()}, indent=2).encode())
    concept = folder / f"{folder.resolve().name}.safetensors"
    if not run.method.startswith("sbora"):
        return Trained(adapter=out, concept=None)
    spec = Spec(
        side=method_side(run.method),
        rank=config.rank,
        intervals=(Interval(config.start, config.rank),),
        seed=config.basis_seed,
        base_id=run.base,
        base_fingerprint=identity,
        tokens={},
        name=concept.stem,
        recipe=config.to_dict() | {"data": str(run.data), "quantize": run.quantize},
        versions=_versions(),
        metrics={"parameters": trained},
    )
    Adapter(spec, collect(model, "default", COMPONENT), {}).save(concept, force=True)
    return Trained(adapter=out, concept=concept)


def _described(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SboraError(f"cannot read {path} ({error})", "choose another --out") from None


def _versions() -> dict[str, str]:
    return {"sbora-diffusion": __version__} | {name: version(name) for name in _LIBRARIES}
