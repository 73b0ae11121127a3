"""Read safetensors files of other programs, and write reproducible ones."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sbora_diffusion.utils.errors import SboraError


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors, copied so that nothing refers to the file."""
    with _opened(path) as file:
        return dict(file.metadata() or {}), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """Read only the metadata."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file, the same bytes for the same tensors and metadata.

    The library's order of metadata differs from run to run, so the header is rewritten here: eight bytes of length,
    then JSON padded with spaces to a multiple of eight.
    """
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    content = safetensors.torch.save(contiguous)
    start = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8:start])}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + content[start:]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise SboraError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise SboraError(
            f"{path}: cannot be read as safetensors ({error})", hint="Convert pickled files (.ckpt, .pt, .bin) first."
        ) from None
