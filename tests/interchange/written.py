"""Write, read and change files of other programs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.interchange.exporting import export
from sbora_diffusion.interchange.importing import read_foreign, to_adapter

from .samples import SHAPES

BASE = ("tiny", "f00d")

Shapes = Mapping[str, tuple[int, int]]


def write(adapter: Adapter, folder: Path, to: str, shapes: Shapes = SHAPES, force: bool = False) -> list[Path]:
    return export(adapter, shapes, to, folder, resolution=512, date="2026-01-02T03:04:05+00:00", force=force)


def read(path: Path, shapes: Shapes = SHAPES, *embeddings: Path, name: str = "dog", noun: str = "") -> Adapter:
    return to_adapter(read_foreign(path, embeddings), shapes, BASE, name, noun)


def contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any], **metadata: str) -> Path:
    """The file as a stranger would have written it, without our metadata."""
    tensors = contents(path)[1]
    changed = change(tensors) or tensors
    safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in changed.items()}, path, metadata)
    return path
