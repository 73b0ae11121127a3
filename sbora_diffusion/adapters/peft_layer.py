"""The fast forward of a PEFT layer: one autograd Function for all active SBoRA adapters, or in-place training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.linear_function import sbora_linear
from sbora_diffusion.adapters.peft_variant import SboraVariant, trained_factor


@dataclass(frozen=True, eq=False)
class ScaledFactor:
    """One adapter's index (r,), trained factor ((out, r) for fa, (r, in) for fb) and scaling."""

    index: Tensor
    factor: Tensor
    scaling: float

    def scaled(self) -> Tensor:
        return self.factor if self.scaling == 1 else self.factor * self.scaling


@dataclass(frozen=True, eq=False)
class _CacheEntry:
    parts: list[ScaledFactor]  # factors are detached, which keeps their memory from being reused
    versions: list[int]
    index: Tensor
    weight: Tensor

    def is_current(self, parts: Sequence[ScaledFactor]) -> bool:
        return len(parts) == len(self.parts) and all(
            part.index is cached.index
            and part.scaling == cached.scaling
            and part.factor.data_ptr() == cached.factor.data_ptr()
            and part.factor._version == version
            for part, cached, version in zip(parts, self.parts, self.versions, strict=True)
        )


class FactorCache:
    """Concatenates the factors of one layer and side along the rank; without gradients, caches the last result.

    Changes that autograd cannot see, such as in-place operations on `.data`, do not invalidate the cache.
    """

    def __init__(self, side: Side) -> None:
        self._dim = 1 if side == "fa" else 0
        self._entry: _CacheEntry | None = None

    def __call__(self, parts: Sequence[ScaledFactor]) -> tuple[Tensor | None, Tensor | None]:
        """Return the index (R,) and the scaled factor, (out, R) for fa or (R, in) for fb; (None, None) for no parts."""
        if not parts:
            return None, None
        if len(parts) == 1:
            return parts[0].index, parts[0].scaled()
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or any(p.factor.is_inference() for p in parts):
            return self._concatenate(parts)
        if self._entry is None or not self._entry.is_current(parts):
            detached = [ScaledFactor(part.index, part.factor.detach(), part.scaling) for part in parts]
            versions = [part.factor._version for part in parts]
            self._entry = _CacheEntry(detached, versions, *self._concatenate(detached))
        return self._entry.index, self._entry.weight

    def _concatenate(self, parts: Sequence[ScaledFactor]) -> tuple[Tensor, Tensor]:
        index = torch.cat([part.index for part in parts])
        return index, torch.cat([part.scaled() for part in parts], dim=self._dim)


class FastForward:
    """Mixin placed before a PEFT layer class: a fast forward for SBoRA adapters, and PEFT's for everything else."""

    inplace: Any = None  # an InplaceWeight within `inplace_training`
    factor_caches: dict[Side, FactorCache]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = self.lora_A
        active = [name for name in self.active_adapters if name in known]
        is_supported = not args and not kwargs and bool(active) and _is_supported(self, active)
        if self.inplace is not None:
            if is_supported and active == [self.inplace.adapter] and not torch.compiler.is_compiling():
                return self.inplace(x)
            self.inplace.restore()
        if not is_supported:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        factors = []
        for side, concatenate in self.factor_caches.items():
            names = [name for name in active if self.lora_variant[name].side == side]
            factors += concatenate([_scaled_factor(self, name, x.device) for name in names])
        return sbora_linear(x, self.base_layer, *factors)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        if self.inplace is not None:
            self.inplace.restore()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[misc]
        return _new, (type(self).__bases__[1],), *state


def make_fast(module: LoraLayer) -> None:
    """Give a PEFT layer the fast forward, in place."""
    if not isinstance(module, FastForward):
        module.__class__ = _fast_class(type(module))
        vars(module)["factor_caches"] = {side: FactorCache(side) for side in get_args(Side)}


def end_inplace_training(module: Any, adapter: str) -> None:
    """Restore the base weight of a layer, and continue the adapter's training with the fused kernel."""
    if module.inplace is not None and module.inplace.adapter == adapter:
        module.inplace.restore()
        module.inplace = None


def has_known_frozen_weight(base: nn.Module) -> bool:
    """Return whether a base weight can be read in the kernel's backward pass, and needs no gradient."""
    own = base._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if "_hf_hook" in vars(base):  # accelerate's offloading removes the weight between forward and backward
        return False
    is_plain = type(base).forward is nn.Linear.forward and type(weight) is nn.Parameter and weight.is_floating_point()
    return is_plain or getattr(weight, "quant_state", None) is not None


@cache
def _fast_class(plain: type) -> type:
    """Make the subclass of a PEFT layer class with the fast forward: PEFT's bitsandbytes layers exist only at run
    time."""
    return type(f"Sbora{plain.__name__}", (FastForward, plain), {})


def _new(plain: type) -> Any:
    """Make an empty layer for pickle and copy, which cannot import a class that was made at run time."""
    return object.__new__(_fast_class(plain))


def _is_supported(module: Any, active: list[str]) -> bool:
    """Return whether the kernel can compute this call. It runs at every call, so each attribute access counts."""
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


def _scaled_factor(module: Any, name: str, device: torch.device) -> ScaledFactor:
    variant = module.lora_variant[name]
    return ScaledFactor(variant.index_on(device), trained_factor(module, name, variant.side), module.scaling[name])
