"""Base models in one checkpoint file, as other programs share them: weights only, the settings come from elsewhere."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from safetensors import SafetensorError, safe_open

from sbora_diffusion.utils.errors import SboraError


def settings_of(checkpoint: Path) -> str:
    """Where the settings of a checkpoint's pipeline are: a folder beside it, or a model of the hub.

    The folder is named as the file is, without its ending: `dream.safetensors` and `dream/`. It is what a pipeline of
    the same kind is in diffusers' format; weights in it are not read, and need not be there.

    Raises:
        SboraError: no safetensors file, or of a kind that diffusers does not know.
    """
    shapes = _shapes(checkpoint)
    beside = checkpoint.with_suffix("")
    if (beside / "model_index.json").is_file():
        return str(beside)
    kind = infer_diffusers_model_type(shapes)
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def load_checkpoint(checkpoint: Path, pipeline: str) -> Any:
    """A pipeline in fp32.

    Args:
        pipeline: the name of its class in diffusers.

    Raises:
        SboraError: a part is missing in the file, or does not have the shape that the settings say.
    """
    settings = settings_of(checkpoint)
    try:
        return getattr(diffusers, pipeline).from_single_file(
            str(checkpoint), config=settings, torch_dtype=torch.float32
        )
    except (SingleFileComponentError, RuntimeError) as error:
        raise SboraError(
            f"base model {checkpoint} does not hold what {settings} describes: {str(error).splitlines()[0]}",
            "use a complete checkpoint (with text encoders and autoencoder), or a folder in diffusers' format",
        ) from error


def _shapes(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors without their numbers."""
    try:
        with safe_open(checkpoint, framework="pt") as file:
            names = list(file.keys())
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise SboraError(
            f"base model {checkpoint} cannot be read as safetensors ({error})",
            "convert pickled files (.ckpt, .pt, .bin) first",
        ) from None
