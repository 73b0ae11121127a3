"""The fast forward of a PEFT layer: all active SBoRA adapters in one autograd Function, or one that is written."""

from functools import cache
from typing import Any, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.joined import Joiner, Part
from sbora_diffusion.adapters.linear_function import sbora_linear
from sbora_diffusion.adapters.peft_variant import SboraVariant, trained_factor


class FastForward:
    """Mixed in before a PEFT layer class: all active SBoRA adapters in one autograd Function, else PEFT's forward."""

    direct: Any = None  # a DirectWeight while `inplace_training` goes on
    joiners: dict[Side, Joiner]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = self.lora_A
        active = [name for name in self.active_adapters if name in known]
        is_usual = not args and not kwargs and bool(active) and _is_usual(self, active)
        if self.direct is not None:
            if is_usual and active == [self.direct.adapter] and not torch.compiler.is_compiling():
                return self.direct(x)
            self.direct.restore()
        if not is_usual:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        factors = []
        for side, joiner in self.joiners.items():
            names = [name for name in active if self.lora_variant[name].side == side]
            factors += joiner([_part(self, name, x.device) for name in names])
        return sbora_linear(x, self.base_layer, *factors)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        if self.direct is not None:
            self.direct.restore()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[misc]
        return _new, (type(self).__bases__[1],), *state


def make_fast(module: LoraLayer) -> None:
    """Give a PEFT layer the fast forward, in place."""
    if not isinstance(module, FastForward):
        module.__class__ = _fast_class(type(module))
        vars(module)["joiners"] = {side: Joiner(side) for side in get_args(Side)}


def end_direct(module: Any, adapter: str) -> None:
    """Take an adapter out of the base weight, and go on with the fused kernel."""
    if module.direct is not None and module.direct.adapter == adapter:
        module.direct.restore()
        module.direct = None


@cache
def _fast_class(plain: type) -> type:
    """The subclass of a PEFT layer class that has the fast forward. It is made at run time, because PEFT's
    bitsandbytes layers exist only where bitsandbytes does."""
    return type(f"Sbora{plain.__name__}", (FastForward, plain), {})


def _new(plain: type) -> Any:
    """Unpickles and copies: pickle cannot import a class that was made at run time."""
    return object.__new__(_fast_class(plain))


def _is_usual(module: Any, active: list[str]) -> bool:
    """Asked at every call: each attribute that is looked up costs a small layer something."""
    if module.disable_adapters or module.merged_adapters:
        return False
    variants = module.lora_variant
    for name in active:
        if not isinstance(variants.get(name), SboraVariant):
            return False
    if module.training:
        dropouts = module.lora_dropout
        for name in active:
            if vars(dropouts[name]).get("p", 0.0):
                return False
    return has_known_frozen_weight(module.base_layer)


def has_known_frozen_weight(base: nn.Module) -> bool:
    """The kernel's backward reads the base weight itself, so it must be there, known and frozen."""
    own = base._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if "_hf_hook" in vars(base):  # accelerate's offloading takes the weight away between forward and backward
        return False
    is_plain = type(base).forward is nn.Linear.forward and type(weight) is nn.Parameter and weight.is_floating_point()
    return is_plain or getattr(weight, "quant_state", None) is not None


def _part(module: Any, name: str, device: torch.device) -> Part:
    variant = module.lora_variant[name]
    return Part(variant.index_on(device), trained_factor(module, name, variant.side), module.scaling[name])
