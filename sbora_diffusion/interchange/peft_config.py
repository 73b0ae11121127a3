"""Rank and scale as PEFT's LoraConfig says them."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sbora_diffusion.adapters.basis import canonical
from sbora_diffusion.utils.errors import SboraError

_UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "modules_to_save", "arrow_config")


def config_of(layers: Iterable[str], rank: int) -> dict[str, Any]:
    """Fields of a LoraConfig in which every layer has this rank and the scale one.

    Args:
        layers: names of modules; they match with any prefix.
    """
    return {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(layers)}


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What PEFT multiplies a layer of this rank with, α/r or, for rsLoRA, α/√r.

    Raises:
        SboraError: no number, a pattern that is more than a name, something that plain LoRA does not have.
    """
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
    """Whether a pattern means a layer. PEFT takes it for a regular expression; from strangers we take names only."""
    plain = name.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.\-]+", plain):
        raise SboraError(f"alpha_pattern has the regular expression {name!r}, only names of layers can be read")
    plain, layer = canonical(plain), canonical(layer)
    return layer == plain or (not name.startswith("^") and layer.endswith(f".{plain}"))
