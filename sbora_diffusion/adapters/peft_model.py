"""SBoRA on your own PEFT model: `model = sbora.peft.get_sbora_model(model, …)` in place of `get_peft_model`."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.layer import attach, collect, detect
from sbora_diffusion.utils.errors import SboraError, guess

__all__ = ["attach", "collect", "detect", "get_sbora_model"]

_SET_HERE = ("r", "target_modules", "peft_type")  # fields of LoraConfig that are arguments of their own, or fixed
_NOT_SBORA = ("use_dora", "lora_bias", "init_lora_weights", "use_qalora", "rank_pattern")
ALLOWED = tuple(sorted({field.name for field in fields(LoraConfig) if field.init}.difference(_SET_HERE, _NOT_SBORA)))


def get_sbora_model(
    model: nn.Module,
    *,
    rank: int = 8,
    side: Side = "fa",
    start: int = 0,
    target_modules: Sequence[str] | str,
    seed: int = 0,
    adapter_name: str = "default",
    **lora_config: Any,
) -> PeftModel:
    """Inject an SBoRA adapter into the linear layers of a model, like PEFT's `get_peft_model`.

    It changes nothing at first, trains in any loop, and `save_pretrained` writes an ordinary PEFT adapter.

    Args:
        rank: number of columns or rows per layer.
        side: "fa" trains columns of the weights, "fb" rows.
        start: first position of the interval [start, start + rank); adapters with disjoint intervals do not overlap.
        target_modules: names of the layers, as in PEFT's LoraConfig.
        seed: of the permutation that maps positions to columns; the same for all adapters of a base model.
        lora_config: other fields of LoraConfig, such as lora_alpha (default: the rank), lora_dropout, task_type.

    Raises:
        SboraError: an unknown argument or side, an interval that does not fit, a target that is not a linear layer.
    """
    if side not in ("fa", "fb"):
        raise SboraError(f"got side={side!r}, expected 'fa' (columns) or 'fb' (rows)")
    unknown = sorted(lora_config.keys() - set(ALLOWED))
    if unknown:
        own = "rank, side, start, target_modules, seed, adapter_name"
        hint = f"{guess(unknown[0], ALLOWED)}allowed are {own}, and of LoraConfig {', '.join(ALLOWED)}"
        raise SboraError(f"got the argument {unknown[0]!r}, which get_sbora_model does not take", hint)
    interval = Interval(start, rank)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(**{"lora_alpha": rank, **lora_config, "r": rank, "target_modules": targets})
    adapted: Any = get_peft_model(model, config, adapter_name)  # type: ignore[arg-type]  # any module will do
    try:
        attach(adapted, adapter_name, side, interval, seed)
    except BaseException:
        adapted.unload()
        raise
    return adapted
