"""From a method's name to what PEFT injects and which side of it SBoRA attaches to."""

from collections.abc import Sequence
from typing import Literal, get_args

from peft import LoraConfig

from sbora_diffusion.adapter.basis import Side
from sbora_diffusion.errors import SboraError

Method = Literal["sbora-fa", "sbora-fb"]
METHODS: tuple[Method, ...] = get_args(Method)


def method_side(method: str) -> Side:
    """The side that a method trains: columns (fa) or rows (fb)."""
    if method == "sbora-fa":
        return "fa"
    if method == "sbora-fb":
        return "fb"
    raise SboraError(f"got unknown method {method!r}, choose from {', '.join(METHODS)}")


def lora_config(rank: int, targets: Sequence[str]) -> LoraConfig:
    """A plain LoRA of scale one on the targets, for `attach` to upgrade."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=True)
