"""Rank and scale in PEFT's LoraConfig."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sbora_diffusion.adapters.basis import canonical
from sbora_diffusion.utils.errors import SboraError

_UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "modules_to_save", "arrow_config")


def config_of(layers: Iterable[str], rank: int) -> dict[str, Any]:
    """Return fields of a LoraConfig that gives every layer this rank and a scale of one.

    Args:
        layers: names of modules; they match with any prefix.
    """
    return {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(layers)}


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return PEFT's scale of a layer of this rank: α/r or, for rsLoRA, α/√r.

    Raises:
        SboraError: α is not a number, a pattern is more than a name, or an option is not plain LoRA.
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
    """Return whether a pattern matches a layer. PEFT allows regular expressions; here only names are accepted."""
    plain = name.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.\-]+", plain):
        raise SboraError(f"alpha_pattern has the regular expression {name!r}, only layer names are supported")
    plain, layer = canonical(plain), canonical(layer)
    return layer == plain or (not name.startswith("^") and layer.endswith(f".{plain}"))
