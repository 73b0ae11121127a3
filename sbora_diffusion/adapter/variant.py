"""What a PEFT LoRA layer does with an SBoRA adapter: fast forward, merge by writing columns, exact unmerge."""

from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from sbora_diffusion.adapter.basis import Side
from sbora_diffusion.adapter.kernel import is_quantised, overwrite, sbora_linear
from sbora_diffusion.errors import SboraError


class SboraVariant:
    """One adapter of one layer, in the slot where PEFT looks for a `LoraVariant` (same methods, signatures tested).

    PEFT's variants are stateless; this one knows its side and index, and between merge and unmerge the original
    columns (FA) or rows (FB), so that unmerge restores them bit for bit whatever happened to the scale meanwhile.
    """

    def __init__(self, side: Side, index: Tensor) -> None:
        self.side: Side = side
        self.index = index  # (r,) int64
        self.original: Tensor | None = None  # (out, r) for fa, (r, in) for fb

    def supports_lora_conversion(self) -> bool:
        return True

    def init(self, module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to do: `attach` has written the factors."""

    def forward(  # PEFT hands keywords of other variants to all
        self,
        module: Any,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **kwargs: Any,  # noqa: ARG002
    ) -> Tensor:
        """The general path: dropout, mixed batches, quantisers that the kernel does not know."""
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
        """The index where the computation is. It follows the model to another device, but not to the meta device."""
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


class FastForward:
    """Mixed in before a PEFT layer class: all active SBoRA adapters in one autograd Function, else PEFT's forward."""

    direct: Any = None  # a DirectWeight while `direct_training` goes on

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        is_usual = not args and not kwargs and bool(active) and _is_usual(self, active)
        if self.direct is not None:
            if is_usual and active == [self.direct.adapter] and not torch.compiler.is_compiling():
                return self.direct(x)
            self.direct.restore()
        if not is_usual:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        fa_index, fa_weight = _joined(self, active, "fa", x.device)
        fb_index, fb_weight = _joined(self, active, "fb", x.device)
        return sbora_linear(x, self.base_layer, fa_index, fa_weight, fb_index, fb_weight)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        if self.direct is not None:
            self.direct.restore()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)  # type: ignore[misc]
        return _new, (type(self).__bases__[1],), *state


@cache
def fast_class(plain: type) -> type:
    """The subclass of a PEFT layer class that has the fast forward. It is made at run time, because PEFT's
    bitsandbytes layers exist only where bitsandbytes does."""
    return type(f"Sbora{plain.__name__}", (FastForward, plain), {})


def _new(plain: type) -> Any:
    """Unpickles and copies: pickle cannot import a class that was made at run time."""
    return object.__new__(fast_class(plain))


def trained_factor(module: LoraLayer, adapter: str, side: Side) -> nn.Parameter:
    """B (out, r) for FA, A (r, in) for FB."""
    factor = (module.lora_B if side == "fa" else module.lora_A)[adapter]
    assert isinstance(factor, nn.Linear)
    assert isinstance(factor.weight, nn.Parameter)
    return factor.weight


def _is_usual(module: Any, active: list[str]) -> bool:
    if module.disable_adapters or module.merged:
        return False
    if not all(isinstance(module.lora_variant.get(name), SboraVariant) for name in active):
        return False
    if module.training and any(getattr(module.lora_dropout[name], "p", 0.0) for name in active):
        return False
    return has_known_frozen_weight(module.base_layer)


def has_known_frozen_weight(base: nn.Module) -> bool:
    """The kernel's backward reads the base weight itself, so it must be there, known and frozen."""
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if not isinstance(weight, Tensor) or weight.requires_grad or (isinstance(bias, Tensor) and bias.requires_grad):
        return False
    if hasattr(base, "_hf_hook"):  # accelerate's offloading takes the weight away between forward and backward
        return False
    is_plain = type(base).forward is nn.Linear.forward and type(weight) is nn.Parameter and weight.is_floating_point()
    return is_plain or getattr(weight, "quant_state", None) is not None


def _joined(module: Any, active: list[str], side: Side, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Index and scaled trained factor of all active adapters of a side, concatenated along the rank."""
    names = [name for name in active if module.lora_variant[name].side == side]
    if not names:
        return None, None
    factors = [(trained_factor(module, name, side), module.scaling[name]) for name in names]
    weights: list[Tensor] = [factor if scaling == 1 else factor * scaling for factor, scaling in factors]
    indices = [module.lora_variant[name].index_on(device) for name in names]
    if len(names) == 1:
        return indices[0], weights[0]
    return torch.cat(indices), torch.cat(weights, dim=1 if side == "fa" else 0)


def _out_by_in(module: Any, weight: Tensor) -> Tensor:
    """A view (out, in) of the base weight: transformers' Conv1D stores its transpose."""
    return weight.t() if getattr(module, "fan_in_fan_out", False) else weight
