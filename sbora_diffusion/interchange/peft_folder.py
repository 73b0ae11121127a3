"""PEFT directories, one per component; vLLM, SGLang and llama.cpp's converter read them, too."""

import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sbora_diffusion.adapters.file import COMPONENTS
from sbora_diffusion.interchange.lora import Lora, common_rank
from sbora_diffusion.interchange.lora_file import read_loras
from sbora_diffusion.interchange.names import peft_name
from sbora_diffusion.interchange.peft_config import config_of, scale_of
from sbora_diffusion.interchange.safefile import read_tensors
from sbora_diffusion.utils.errors import SboraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def peft_component(loras: Mapping[str, Lora], base_id: str, layers: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """Return the configuration (JSON) and tensors of one component's directory.

    Args:
        loras: of scale one, one rank and one component, by "<component>.<canonical layer>".
        layers: all layers of the base model, by the same names.
    """
    names = {key: peft_name(key, layers) for key in loras}
    is_language_model = all(key.startswith("model.") for key in loras)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_language_model else None,
        "base_model_name_or_path": base_id,
        **config_of(names.values(), common_rank(loras)),
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for key, lora in loras.items():
        tensors[f"{_PREFIX}{names[key]}.lora_A.weight"] = lora.down
        tensors[f"{_PREFIX}{names[key]}.lora_B.weight"] = lora.up
    return json.dumps(config, indent=2, sort_keys=True), tensors


def is_peft_folder(folder: Path) -> bool:
    """Return whether a folder is a PEFT directory, or contains one for a component."""
    return bool(_folders(folder))


def read_peft(folder: Path) -> tuple[dict[str, str], dict[str, Lora]]:
    """Read metadata and LoRAs of a PEFT directory, or of a folder with one per component.

    Returns:
        Metadata, and LoRAs by module name, with the component in front if the directory is named after it.
    """
    metadata, loras = {}, {}
    for one in _folders(folder):
        metadata, tensors = read_tensors(one / WEIGHTS)
        config = _read_config(one / CONFIG)
        prefix = f"{one.name}." if one.name in COMPONENTS else ""
        plain = {key.removeprefix(_PREFIX).replace(".default.weight", ".weight"): t for key, t in tensors.items()}
        try:
            found = read_loras(plain, {}, partial(scale_of, config))
        except SboraError as defect:
            raise SboraError(f"{one / WEIGHTS}: {defect}", defect.hint) from None
        loras |= {f"{prefix}{name}": lora for name, lora in found.items()}
    return metadata, loras


def _folders(folder: Path) -> list[Path]:
    candidates = [folder, *(folder / component for component in COMPONENTS)]
    return [candidate for candidate in candidates if (candidate / CONFIG).is_file()]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SboraError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise SboraError(f"{path}: is of type {kind!r}, expected a LoRA")
    return config
