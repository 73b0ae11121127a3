"""The LoRA variant of SBoRA in PEFT's layers: forward, merge by writing columns or rows, exact unmerge."""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.linear_function import is_quantised, overwrite
from sbora_diffusion.utils.errors import SboraError


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

    def forward(  # PEFT passes the keywords of all variants
        self,
        module: Any,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **kwargs: Any,  # noqa: ARG002
    ) -> Tensor:
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
