"""Tests beside open_clip, which live in an environment of their own: `bash .ci/clip`. Elsewhere none is collected."""

import importlib
import sys
from importlib.util import find_spec

import torch

collect_ignore_glob = [] if find_spec("open_clip") else ["test_*.py"]


def _import_torchvision() -> torch.library.Library | None:
    """Import torchvision even where its compiled operators do not load, as beside a CPU torch: CLIP needs none.

    Returns:
        The library that defines the two operators which torchvision asks for at import; it must stay alive.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        return operators
    return None


if not collect_ignore_glob:
    _operators = _import_torchvision()
