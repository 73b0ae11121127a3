"""In which precision the files of a pipeline hold its components, by the headers of their safetensors."""

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import safe_open

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fetched(name: str, **options: Any) -> Path:
    """The folder of a pipeline in diffusers' format: itself, or where a model of the hub is kept.

    Args:
        options: those of `from_pretrained` that say which components are not wanted.
    """
    return Path(name) if Path(name).is_dir() else Path(DiffusionPipeline.download(name, **options))


def stored_in(folder: Path, dtype: torch.dtype) -> list[str]:
    """The components whose files hold numbers of this type only, so that reading them in it rounds nothing."""
    return [part.name for part in sorted(folder.iterdir()) if part.is_dir() and _types(part) == {dtype}]


def _types(part: Path) -> set[torch.dtype | None]:
    """Of everything in a component's files; None stands for types that are not floating point numbers."""
    found: set[torch.dtype | None] = set()
    for path in part.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {_TYPES.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    return found
