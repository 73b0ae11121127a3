"""LoRA files of diffusers (`pytorch_lora_weights.safetensors`) and kohya (for ComfyUI, A1111 and Forge)."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.interchange.lora import Lora, check_lora, common_rank
from sbora_diffusion.interchange.names import diffusers_name, kohya_name
from sbora_diffusion.interchange.peft_config import config_of, scale_of
from sbora_diffusion.utils.errors import SboraError

_CONFIG = "lora_adapter_metadata"  # diffusers' metadata: the fields of PEFT's LoraConfig, by "<component>.<field>"

_PARTS = {
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}


def diffusers_file(loras: Mapping[str, Lora], metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a diffusers LoRA file.

    Args:
        loras: of scale one and one rank, by "<component>.<canonical layer>".
        metadata: see provenance.py.
    """
    tensors, config = {}, {}
    for key, lora in loras.items():
        kind = "lora" if key.startswith(("unet.", "transformer.")) else "lora_linear_layer"
        tensors[f"{diffusers_name(key)}.{kind}.down.weight"] = lora.down
        tensors[f"{diffusers_name(key)}.{kind}.up.weight"] = lora.up
    for component in sorted({key.partition(".")[0] for key in loras}):
        layers = [key.partition(".")[2] for key in loras if key.startswith(f"{component}.")]
        config |= {f"{component}.{field}": value for field, value in config_of(layers, common_rank(loras)).items()}
    return tensors, {**metadata, "format": "pt", _CONFIG: json.dumps(config, sort_keys=True)}


def kohya_file(loras: Mapping[str, Lora], *, sdxl: bool) -> dict[str, Tensor]:
    """Return the tensors of a kohya LoRA file; alpha = rank means that the scale is one.

    Args:
        loras: of scale one and one rank, by "<component>.<canonical layer>".
        sdxl: use the original implementation's names of U-Net blocks.
    """
    tensors, rank = {}, common_rank(loras)
    for key, lora in loras.items():
        name = kohya_name(key, sdxl)
        tensors[f"{name}.lora_down.weight"] = lora.down
        tensors[f"{name}.lora_up.weight"] = lora.up
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


def read_loras(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], scale: Callable[[str, int], float] | None = None
) -> dict[str, Lora]:
    """Read the LoRAs of a file of any format, in float32, by the file's own layer names.

    Args:
        scale: returns the scale of a layer and rank without `alpha` in the file; None: from diffusers' metadata, or 1.

    Raises:
        SboraError: keys that belong to no plain LoRA, or factors that are missing or do not fit.
    """
    scale = scale or _diffusers_scale(metadata)
    loras = {}
    for name, parts in _gather(tensors).items():
        missing = {"down", "up"} - parts.keys()
        if missing:
            raise SboraError(f"layer {name} lacks its {' and '.join(sorted(missing))} factor")
        down, up = parts["down"], parts["up"]
        check_lora(name, Lora(down, up))
        alpha = parts.get("alpha")
        factor = scale(name, down.shape[0]) if alpha is None else _number(name, alpha) / down.shape[0]
        loras[name] = Lora(down.float(), up.float(), factor)
        check_lora(name, loras[name])
    if not loras:
        raise SboraError("holds no LoRA layer")
    return loras


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by layer and part (down, up, alpha)."""
    gathered: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in _PARTS if key.endswith(ending)), None)
        if ending is None or not key.isprintable():
            raise SboraError(
                f"has the key {key!r}, which belongs to no plain LoRA",
                hint="DoRA, LyCORIS, biases and full layers cannot be imported.",
            )
        parts = gathered.setdefault(key.removesuffix(ending), {})
        if _PARTS[ending] in parts:
            raise SboraError(f"layer {key.removesuffix(ending)} has two {_PARTS[ending]} factors")
        parts[_PARTS[ending]] = tensor
    return gathered


def _diffusers_scale(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """Return diffusers' scale of a layer, from its metadata; 1 without metadata."""
    try:
        config = json.loads(metadata.get(_CONFIG, "{}"))
    except (ValueError, RecursionError) as error:
        raise SboraError(f"the metadata {_CONFIG} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise SboraError(f"the metadata {_CONFIG} is {type(config).__name__}, expected an object")

    def scale(name: str, rank: int) -> float:
        component, _, layer = name.partition(".")
        own: dict[str, Any] = {
            key.removeprefix(f"{component}."): value for key, value in config.items() if key.startswith(f"{component}.")
        }
        return scale_of(own, layer, rank) if own else 1.0

    return scale


def _number(name: str, alpha: Tensor) -> float:
    if alpha.numel() != 1 or alpha.is_complex():
        raise SboraError(f"alpha of layer {name} has {alpha.numel()} values of {alpha.dtype}, expected one")
    return float(alpha)
