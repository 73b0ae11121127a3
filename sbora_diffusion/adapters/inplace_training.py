"""In-place training: the trained columns or rows live in the base weight itself, so a layer costs one product.

The fused kernel adds a narrow product to the layer's own, in both directions. Here the trained factor is the master
copy: before each forward pass, original + scaled factor is written into the columns (FA) or rows (FB) of the weight,
and the backward pass needs only the written weight and the gathered inputs.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.linear_function import (
    add_to_input_gradient,
    expand_columns,
    factor_gradient,
    is_quantised,
    overwrite,
    without_autocast,
)
from sbora_diffusion.adapters.peft_layer import FastForward, SboraVariant, has_known_frozen_weight


@contextmanager
def inplace_training(model: nn.Module, adapter: str) -> Iterator[list[str]]:
    """Train an SBoRA adapter inside the base weights: same outputs and gradients, up to rounding, in less time.

    Within the block, base weights may contain the adapter: do not read or change them, only run the model. Everything
    else works as usual (other active adapters, `disable_adapter`, merging): the layer restores its weight first and
    uses the fused kernel. In half precision, written entries are rounded to the weight's dtype, as by a merge; the
    trained factor is not. At the end, also after an exception, the base weights are restored bit for bit.

    Layers are skipped whose weight is quantised, sharded, offloaded, not frozen, shared, or already trained in place.

    Yields:
        The names of the modules that are trained in place.
    """
    shared = _shared_addresses(model)
    found = {
        name: InplaceWeight(module, adapter)
        for name, module in model.named_modules()
        if isinstance(module, FastForward) and _is_writable(module, adapter, shared)
    }
    try:
        for weight in found.values():
            weight.module.inplace = weight
        yield list(found)
    finally:
        for weight in found.values():
            weight.restore()
            weight.module.inplace = None


def _shared_addresses(model: nn.Module) -> set[int]:
    """Return the addresses of parameters with several names."""
    seen = Counter(map(_address, (parameter for _, parameter in model.named_parameters(remove_duplicate=False))))
    return {address for address, count in seen.items() if count > 1}


def _address(parameter: Tensor) -> int:
    """Return a parameter's address in memory; on the meta device, which has none, its identity."""
    return parameter.data_ptr() or id(parameter)


def _is_writable(module: Any, adapter: str, shared: set[int]) -> bool:
    if not isinstance(module.lora_variant.get(adapter), SboraVariant) or module.inplace is not None:
        return False
    if module.merged or module.fan_in_fan_out:
        return False
    base = module.get_base_layer()
    if not has_known_frozen_weight(base) or type(base.weight) is not nn.Parameter or is_quantised(base.weight):
        return False
    is_sharded = any(hasattr(base.weight, mark) for mark in ("_fsdp_flattened", "ds_id"))
    return not is_sharded and _address(base.weight) not in shared


class InplaceWeight:
    """One adapter in one base weight: the original entries, and whether the adapter's are written at the moment."""

    def __init__(self, module: Any, adapter: str) -> None:
        self.module, self.adapter = module, adapter
        self._variant: SboraVariant = module.lora_variant[adapter]
        self._base = module.get_base_layer()
        self._dim = 1 if self.side == "fa" else 0
        self._trained: nn.Linear = (module.lora_B if self.side == "fa" else module.lora_A)[adapter]
        weight, factor = self._base.weight.detach(), self._trained.weight
        self._original = weight.index_select(self._dim, self._index).to(torch.promote_types(weight.dtype, factor.dtype))
        self._expanded = expand_columns(weight, self._index)
        self._written_scaling: float | None = None  # None while the original entries are in place

    @property
    def side(self) -> Side:
        return self._variant.side

    @property
    def _index(self) -> Tensor:
        return self._variant.index_on(self._base.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output (..., out) for x (..., in)."""
        factor, scaling, index = self._trained.weight, self.module.scaling[self.adapter], self._index
        self._write(factor.detach(), scaling, index)
        result = _InplaceLinear.apply(x, factor, scaling, self, self._base, index)
        assert isinstance(result, Tensor)
        return result

    def holds(self, scaling: float) -> bool:
        """Return whether the adapter is written with this scaling; restore the weight if it is another one."""
        if self._written_scaling != scaling:
            self.restore()
        return self._written_scaling == scaling

    def _write(self, factor: Tensor, scaling: float, index: Tensor) -> None:
        """Write the adapter's entries through `.data`, which autograd does not count as a change of the weight: the
        backward pass knows these entries from the factor, whose changes autograd does track."""
        weight = self._base.weight.data
        if self._original.device != weight.device:
            self._original, self._expanded = self._original.to(weight.device), expand_columns(weight, index)
        written = torch.add(self._original, factor, alpha=scaling).to(weight.dtype)
        self._written_scaling = scaling  # set first: after an interrupt in between, the weight will be restored
        overwrite(weight, self._dim, index, written, self._expanded)

    def restore(self) -> None:
        """Write the original entries back, if the adapter's are there."""
        if self._written_scaling is not None:
            weight = self._base.weight.data
            overwrite(weight, self._dim, self._index, self._original.to(weight))
            self._written_scaling = None


class _InplaceLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, scaling: float, inplace: InplaceWeight, base: nn.Module, index: Tensor
    ) -> Tensor:
        needs_x, needs_factor, *_ = ctx.needs_input_grad
        is_gathered = needs_factor and inplace.side == "fa"
        gathered = x.index_select(-1, index) if is_gathered else x  # first: the product evicts x from the caches
        y = base(x)
        kept = gathered.to(y.dtype) if is_gathered else x if needs_factor else None
        ctx.about = x.shape, x.dtype, scaling, inplace
        ctx.save_for_backward(kept, base.weight if needs_x else None, factor, index)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # once_differentiable makes ctx positional
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        kept, weight, factor, index = ctx.saved_tensors  # raises if the factor has changed
        shape, dtype, scaling, inplace = ctx.about
        grad, side = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1]), inplace.side
        grad_x = grad_factor = None
        with without_autocast(grad.device.type):  # every cast below is explicit
            if kept is not None:
                grad_factor = factor_gradient(side, grad, kept, index)
                grad_factor = grad_factor if scaling == 1 else grad_factor * scaling
            if weight is not None:
                is_written = inplace.holds(scaling)
                grad_x = grad @ weight.to(grad.dtype)
                if not is_written:
                    add_to_input_gradient(side, grad_x, grad, factor * scaling, index)
                grad_x = grad_x.view(shape).to(dtype)
        return grad_x, grad_factor, None, None, None, None
