"""Teach a diffusion model a concept from a handful of images; combine concepts, or remove them exactly.

The names below are the Python API (docs/python.md). They are imported on first use, because torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Library",
    "SboraError",
    "apply",
    "evaluate",
    "generate",
    "load_base",
    "load_concept",
    "merge",
    "peft",
    "train",
]

if TYPE_CHECKING:
    from sbora_diffusion.adapters import peft_model as peft
    from sbora_diffusion.adapters.file import Adapter
    from sbora_diffusion.data.concept import load_concept
    from sbora_diffusion.evaluation.evaluate import evaluate
    from sbora_diffusion.inference.apply import apply
    from sbora_diffusion.inference.text_to_image import generate
    from sbora_diffusion.library.library import Library
    from sbora_diffusion.methods.merging import merge
    from sbora_diffusion.models.base import load_base
    from sbora_diffusion.training.train import train
    from sbora_diffusion.utils.errors import SboraError

_MODULES = {
    "Adapter": "adapters.file",
    "Library": "library.library",
    "SboraError": "utils.errors",
    "apply": "inference.apply",
    "evaluate": "evaluation.evaluate",
    "generate": "inference.text_to_image",
    "load_base": "models.base",
    "load_concept": "data.concept",
    "merge": "methods.merging",
    "train": "training.train",
}


def __getattr__(name: str) -> Any:
    if name == "peft":
        value: Any = import_module("sbora_diffusion.adapters.peft_model")
    elif name in _MODULES:
        value = getattr(import_module(f"sbora_diffusion.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'sbora_diffusion' has no attribute {name!r}, only {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
