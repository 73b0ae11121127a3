"""LoRA files of diffusers, kohya (for ComfyUI, A1111 and Forge) and PEFT (for vLLM, SGLang and llama.cpp, too)."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sbora_diffusion.adapters.basis import canonical
from sbora_diffusion.adapters.file import COMPONENTS
from sbora_diffusion.interchange.lora import Lora, check_lora, common_rank
from sbora_diffusion.interchange.names import diffusers_name, kohya_name, peft_name
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import check_regular, read_bytes
from sbora_diffusion.utils.text import parse_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of a PEFT directory
_PREFIX = "base_model.model."
_METADATA = "lora_adapter_metadata"  # diffusers' metadata: the fields of PEFT's LoraConfig, by "<component>.<field>"
_UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "modules_to_save", "arrow_config")
_PARTS = {
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"), "up"),
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors, copied so that nothing refers to the file."""
    with _opened(path) as file:
        return dict(file.metadata() or {}), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """Read only the metadata."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise SboraError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        hint = "Convert pickled files (.ckpt, .pt, .bin) first."
        raise SboraError(f"{path}: cannot be read as safetensors ({error})", hint) from None


def diffusers_file(loras: Mapping[str, Lora], metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a diffusers LoRA file.

    Args:
        loras: of scale one and one rank, by "<component>.<canonical layer>".
        metadata: what else to store.
    """
    tensors, config = {}, {}
    is_transformer = any(key.startswith("transformer.") for key in loras)  # FLUX and SD3 files have PEFT's names
    for key, lora in loras.items():
        kind = "lora" if key.startswith("unet.") else "lora_linear_layer"
        down, up = ("lora_A", "lora_B") if is_transformer else (f"{kind}.down", f"{kind}.up")
        tensors |= {f"{diffusers_name(key)}.{down}.weight": lora.down, f"{diffusers_name(key)}.{up}.weight": lora.up}
    for component in sorted({key.partition(".")[0] for key in loras}):
        layers = [key.partition(".")[2] for key in loras if key.startswith(f"{component}.")]
        config |= {f"{component}.{field}": value for field, value in _config_of(layers, common_rank(loras)).items()}
    return tensors, {**metadata, "format": "pt", _METADATA: json.dumps(config, sort_keys=True)}


def kohya_file(loras: Mapping[str, Lora], *, sdxl: bool) -> dict[str, Tensor]:
    """Return the tensors of a kohya LoRA file; alpha = rank means that the scale is one.

    Args:
        loras: of scale one and one rank, by "<component>.<canonical layer>".
        sdxl: use the original implementation's names of U-Net blocks.
    """
    tensors, alpha = {}, float(common_rank(loras))
    for key, lora in loras.items():
        name = kohya_name(key, sdxl)
        tensors |= {f"{name}.lora_down.weight": lora.down, f"{name}.lora_up.weight": lora.up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft_component(loras: Mapping[str, Lora], base_id: str, layers: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """Return the configuration (JSON) and tensors of one component's PEFT directory.

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
        **_config_of(names.values(), common_rank(loras)),
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


def _config_of(layers: Iterable[str], rank: int) -> dict[str, Any]:
    """Return fields of a LoraConfig that gives every layer this rank and a scale of one; names match any prefix."""
    return {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(layers)}


def is_peft_folder(folder: Path) -> bool:
    """Return whether a folder is a PEFT directory, or contains one for a component."""
    return bool(_peft_folders(folder))


def read_peft(folder: Path) -> tuple[dict[str, str], dict[str, Lora]]:
    """Read metadata and LoRAs of a PEFT directory, or of a folder with one per component.

    Returns:
        Metadata, and LoRAs by module name, with the component in front if the directory is named after it.
    """
    metadata, loras = {}, {}
    for one in _peft_folders(folder):
        metadata, tensors = read_tensors(one / WEIGHTS)
        config = _read_config(one / CONFIG)
        prefix = f"{one.name}." if one.name in COMPONENTS else ""
        plain = {key.removeprefix(_PREFIX).replace(".default.weight", ".weight"): t for key, t in tensors.items()}
        try:
            found = read_loras(plain, {}, partial(_scale_of, config))
        except SboraError as defect:
            raise SboraError(f"{one / WEIGHTS}: {defect}", defect.hint) from None
        loras |= {f"{prefix}{name}": lora for name, lora in found.items()}
    return metadata, loras


def _peft_folders(folder: Path) -> list[Path]:
    candidates = [folder, *(folder / component for component in COMPONENTS)]
    return [candidate for candidate in candidates if (candidate / CONFIG).is_file()]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise SboraError(f"{path}: cannot be read as JSON ({error})") from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or kind != "LORA":
        raise SboraError(f"{path}: is of type {kind!r}, expected a LoRA")
    return config


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
        down, up, alpha = parts["down"], parts["up"], parts.get("alpha")
        check_lora(name, Lora(down, up))
        if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
            raise SboraError(f"alpha of layer {name} has {alpha.numel()} values of {alpha.dtype}, expected one")
        factor = scale(name, down.shape[0]) if alpha is None else float(alpha) / down.shape[0]
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
            hint = "DoRA, LyCORIS, biases and full layers cannot be imported."
            raise SboraError(f"has the key {key!r}, which belongs to no plain LoRA", hint)
        parts = gathered.setdefault(key.removesuffix(ending), {})
        if _PARTS[ending] in parts:
            raise SboraError(f"layer {key.removesuffix(ending)} has two {_PARTS[ending]} factors")
        parts[_PARTS[ending]] = tensor
    return gathered


def _diffusers_scale(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """Return diffusers' scale of a layer, from its metadata; 1 without metadata."""
    try:
        config = parse_json(metadata.get(_METADATA, "{}"))
    except ValueError as error:
        raise SboraError(f"the metadata {_METADATA} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise SboraError(f"the metadata {_METADATA} is {type(config).__name__}, expected an object")

    def scale(name: str, rank: int) -> float:
        component, _, layer = name.partition(".")
        prefix = f"{component}."
        own = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        return _scale_of(own, layer, rank) if own else 1.0

    return scale


def _scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return PEFT's scale of a layer of this rank: α/r or, for rsLoRA, α/√r."""
    for field in _UNSUPPORTED:
        if config.get(field):
            raise SboraError(f"was made with {field}, which SBoRA adapters cannot express")
    if config.get("bias", "none") != "none":
        raise SboraError(f"was made with bias {config['bias']!r}, which SBoRA adapters cannot express")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise SboraError(f"alpha_pattern is {type(patterns).__name__}, expected an object")
    alpha = next((value for name, value in patterns.items() if _matches(name, layer)), config.get("lora_alpha", rank))
    if type(alpha) not in (int, float) or not abs(alpha) <= 1e6:
        raise SboraError(f"the alpha of layer {layer} is {alpha!r}, expected a number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") is True else alpha / rank


def _matches(name: str, layer: str) -> bool:
    """Return whether a pattern matches a layer. PEFT allows regular expressions; here only names are accepted."""
    plain = name.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.\-]+", plain):
        raise SboraError(f"alpha_pattern has the regular expression {name!r}, only layer names are supported")
    plain, layer = canonical(plain), canonical(layer)
    return layer == plain or (not name.startswith("^") and layer.endswith(f".{plain}"))
