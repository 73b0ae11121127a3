"""The fast forward of a PEFT layer: one autograd Function for all active SBoRA adapters, or in-place training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.linear_function import is_quantised, overwrite, sbora_linear
from sbora_diffusion.utils.errors import SboraError


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
    """Make the subclass of a PEFT layer class with the fast forward; some of these classes exist only at run time."""
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


class SboraVariant:
    """One adapter of one layer, with the methods of PEFT's `LoraVariant` (tests compare the signatures).

    PEFT's variants are stateless. This one holds its side and index, and between merge and unmerge the original
    columns (FA) or rows (FB): unmerge restores them bit for bit, even if the scale has changed meanwhile.
    """

    def __init__(self, side: Side, index: Tensor) -> None:
        self.side: Side = side
        self.index = index  # (r,) int64
        self.original: Tensor | None = None  # (out, r) for fa, (r, in) for fb

    def supports_lora_conversion(self) -> bool:
        return True

    def init(self, module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing: `attach` writes the factors."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """Compute the output on the general path: dropout, mixed batches, quantisers unknown to the kernel."""
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        index = self.index_on(x.device)
        if self.side == "fa":
            return result + module.lora_B[active_adapter](dropout(x.index_select(-1, index))) * scaling
        delta = module.lora_A[active_adapter](dropout(x)) * scaling
        dtype = torch.promote_types(result.dtype, delta.dtype)
        return result.to(dtype).index_add(-1, index, delta.to(dtype))

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged = orig_weight.clone()
        self._write(module, active_adapter, merged)
        return merged

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        self._write(module, active_adapter, orig_weight.data)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # noqa: ARG002
        assert self.original is not None, "unmerge follows merge"
        weight = _out_by_in(module, orig_weight.data)
        overwrite(weight, self._dim, self.index_on(weight.device), self.original.to(weight))
        self.original = None
        return orig_weight.data

    def index_on(self, device: torch.device) -> Tensor:
        """Return the index on a device. It follows the model to another device, but not to the meta device."""
        if self.index.device != device and device.type != "meta":
            self.index = self.index.to(device)
        return self.index.to(device)

    @property
    def _dim(self) -> int:
        return 1 if self.side == "fa" else 0

    @torch.no_grad()
    def _write(self, module: Any, adapter: str, weight: Tensor) -> None:
        if is_quantised(module.get_base_layer().weight):
            raise SboraError(
                "an adapter cannot be merged into quantised weights: requantising changes entries it does not own",
                hint="Keep the adapter live, or merge it into a copy of the model that is not quantised.",
            )
        weight, index = _out_by_in(module, weight), self.index_on(weight.device)
        self.original = weight.index_select(self._dim, index)
        delta = trained_factor(module, adapter, self.side).to(weight.device) * module.scaling[adapter]
        merged = self.original.to(torch.promote_types(weight.dtype, delta.dtype)) + delta
        overwrite(weight, self._dim, index, merged.to(weight.dtype))


def trained_factor(module: LoraLayer, adapter: str, side: Side) -> nn.Parameter:
    """Return B (out, r) for FA, or A (r, in) for FB."""
    factor = (module.lora_B if side == "fa" else module.lora_A)[adapter]
    assert isinstance(factor, nn.Linear)
    assert isinstance(factor.weight, nn.Parameter)
    return factor.weight


def _out_by_in(module: Any, weight: Tensor) -> Tensor:
    """Return a view (out, in) of the base weight: transformers' Conv1D stores its transpose."""
    return weight.t() if getattr(module, "fan_in_fan_out", False) else weight
