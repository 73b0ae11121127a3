"""What a PEFT LoRA layer does with an SBoRA adapter: forward, merge by writing columns, exact unmerge."""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.linear_function import is_quantised, overwrite
from sbora_diffusion.utils.errors import SboraError


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


def trained_factor(module: LoraLayer, adapter: str, side: Side) -> nn.Parameter:
    """B (out, r) for FA, A (r, in) for FB."""
    factor = (module.lora_B if side == "fa" else module.lora_A)[adapter]
    assert isinstance(factor, nn.Linear)
    assert isinstance(factor.weight, nn.Parameter)
    return factor.weight


def _out_by_in(module: Any, weight: Tensor) -> Tensor:
    """A view (out, in) of the base weight: transformers' Conv1D stores its transpose."""
    return weight.t() if getattr(module, "fan_in_fan_out", False) else weight
