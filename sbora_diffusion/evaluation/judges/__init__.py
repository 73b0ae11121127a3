"""Find a judge by its name: "KIND:NAME" with the kind's module in this package, or the name of a CLIP model."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType

from sbora_diffusion.evaluation import judges
from sbora_diffusion.evaluation.judges.base import Judge, Metric

KINDS = tuple(
    sorted(module.name for module in pkgutil.iter_modules(judges.__path__) if module.name not in ("base", "registry"))
)


def load_judge(name: str) -> Judge:
    """Load a judge in float32, on the GPU if there is one.

    Args:
        name: "emoji-clip", which comes with the package; a folder or hub id of a transformers CLIPModel;
            "open_clip:NAME/PRETRAINED"; "vision:ID" of a transformers vision model; or "KIND:NAME" of another module.

    Raises:
        SboraError: no such model, or one that cannot be used.
    """
    module, rest = _split(name)
    return module.load(rest)


def metrics_of(name: str) -> Mapping[str, Metric]:
    """Return what a judge scores, without loading it."""
    return _split(name)[0].METRICS


def _split(name: str) -> tuple[ModuleType, str]:
    """Return the module of a judge's kind, and the name for its `load`."""
    kind, colon, rest = name.partition(":")
    if not (colon and kind in KINDS):
        kind, rest = "clip", name
    return importlib.import_module(f"{judges.__name__}.{kind}"), rest
