"""The forward and backward pass of a linear layer with SBoRA adapters, as one autograd Function."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.distributed.tensor import DTensor

from sbora_diffusion.adapters.basis import Side


def sbora_linear(
    x: Tensor,
    base_layer: nn.Module,
    fa_index: Tensor | None,
    fa_weight: Tensor | None,
    fb_index: Tensor | None,
    fb_weight: Tensor | None,
) -> Tensor:
    """y = base_layer(x) + x[..., fa_index] @ fa_weightᵀ, then y[..., fb_index] += x @ fb_weightᵀ.

    Several adapters of one side are concatenated along the rank; their indices may repeat. Adapters compute in the
    dtype of the base layer's output. For the backward pass, the gathered columns of x (FA) or x itself (FB) are saved,
    and only if a gradient is required. The base layer must be frozen.

    Args:
        x: (..., in).
        base_layer: a linear layer with a plain floating-point weight, or a bitsandbytes Linear4bit.
        fa_index: (r,) int64 columns, with fa_weight (out, r), scale included. None for both: no FA adapter.
        fb_index: (r,) int64 rows, with fb_weight (r, in), scale included. None for both: no FB adapter.

    Returns:
        (..., out).
    """
    if not torch.is_grad_enabled():  # for a small layer, a Function costs as much as the product
        return _forward(x, base_layer, fa_index, fa_weight, fb_index, fb_weight)[0]
    result = _SboraLinear.apply(x, base_layer, fa_index, fa_weight, fb_index, fb_weight)
    assert isinstance(result, Tensor)
    return result


def _forward(
    x: Tensor,
    base_layer: nn.Module,
    fa_index: Tensor | None,
    fa_weight: Tensor | None,
    fb_index: Tensor | None,
    fb_weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and the gathered columns of x (tokens, r) if there is an FA adapter."""
    y = base_layer(x)
    rows = y.reshape(-1, y.shape[-1])  # (tokens, out)
    gathered = None
    if fa_index is not None and fa_weight is not None:
        gathered = gather_inputs(x, fa_index, y.dtype)
        rows.addmm_(gathered, fa_weight.to(y.dtype).t())
    if fb_index is not None and fb_weight is not None:
        with without_autocast(
            y.device.type
        ):  # a quantised layer returns its input's dtype, under autocast a product does not
            rows.index_add_(-1, fb_index, _narrow_product(_rows(x).to(y.dtype), fb_weight.to(y.dtype)))
    return rows.view(y.shape), gathered


class _SboraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_layer: Any,
        fa_index: Tensor | None,
        fa_weight: Tensor | None,
        fb_index: Tensor | None,
        fb_weight: Tensor | None,
    ) -> Tensor:
        y, gathered = _forward(x, base_layer, fa_index, fa_weight, fb_index, fb_weight)
        needs_x, _, _, needs_fa, _, needs_fb = ctx.needs_input_grad
        weight, is_plain = base_layer.weight, not is_quantised(base_layer.weight)
        ctx.shape, ctx.dtype, ctx.quantised = x.shape, x.dtype, None if is_plain else weight
        ctx.save_for_backward(
            x if needs_fb else None,
            gathered if needs_fa else None,
            weight if needs_x and is_plain else None,
            fa_index,
            fa_weight if needs_x else None,
            fb_index,
            fb_weight if needs_x else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # once_differentiable makes ctx positional
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, gathered, weight, fa_index, fa_weight, fb_index, fb_weight = ctx.saved_tensors
        grad = _rows(grad_outputs[0])  # (tokens, out)
        grad_x = grad_fa = grad_fb = None
        with without_autocast(grad.device.type):  # every cast below is explicit
            if gathered is not None:
                grad_fa = factor_gradient("fa", grad, gathered, fa_index)
            if x is not None:
                grad_fb = factor_gradient("fb", grad, x, fb_index)
            if ctx.needs_input_grad[0]:
                base_weight = weight if ctx.quantised is None else dequantize_bnb_weight(ctx.quantised)
                grad_x = grad @ base_weight.to(grad.dtype)
                if fa_weight is not None:
                    add_to_input_gradient("fa", grad_x, grad, fa_weight, fa_index)
                if fb_weight is not None:
                    add_to_input_gradient("fb", grad_x, grad, fb_weight, fb_index)
                grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, grad_fa, None, grad_fb


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Disable autocast; the check first is cheaper, because autocast is off in most backward passes."""
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def gather_inputs(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the columns `index` (r,) of x (..., in), as rows (tokens, r) of `dtype`."""
    return x.index_select(-1, index).reshape(-1, len(index)).to(dtype)


def factor_gradient(side: Side, grad: Tensor, kept: Tensor, index: Tensor) -> Tensor:
    """Return the gradient of the trained factor: (out, r) for fa, (r, in) for fb.

    Args:
        grad: (tokens, out), of the layer's output.
        kept: the gathered inputs (..., r) for fa, the inputs (..., in) for fb.
    """
    if side == "fa":
        return _narrow_product(grad.t(), _rows(kept).t().to(grad.dtype))
    return grad.index_select(-1, index).t() @ _rows(kept).to(grad.dtype)


def add_to_input_gradient(side: Side, grad_x: Tensor, grad: Tensor, factor: Tensor, index: Tensor) -> None:
    """Add an adapter's contribution to grad_x (tokens, in) in place, given grad (tokens, out)."""
    factor = factor.to(grad.dtype)
    if side == "fa":
        grad_x.index_add_(-1, index, _narrow_product(grad, factor.t()))
    else:
        grad_x.addmm_(grad.index_select(-1, index), factor)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _narrow_product(rows: Tensor, factor: Tensor) -> Tensor:
    """Return rows (n, k) @ factorᵀ (k, r) for a small r, as (factor @ rowsᵀ)ᵀ: up to eight times faster on CPUs."""
    return (factor @ rows.t()).t()


def overwrite(weight: Tensor, dim: int, index: Tensor, values: Tensor, expanded: Tensor | None = None) -> None:
    """Write values (r, in) into the rows `index` of a weight (out, in), or (out, r) into its columns if `dim` is 1.

    Args:
        expanded: `expand_columns(weight, index)`, if it is known.
    """
    if dim == 0:
        weight.index_copy_(0, index, values)
    else:  # two to three times faster than index_copy_ on CPUs
        weight.scatter_(1, expand_columns(weight, index) if expanded is None else expanded, values)


def expand_columns(weight: Tensor, index: Tensor) -> Tensor:
    """Return the columns `index` (r,) for each row of a weight (out, in): a view (out, r)."""
    return index.expand(weight.shape[0], -1)


def is_quantised(weight: Tensor) -> bool:
    """Return whether the entries of a weight are packed, so that they cannot be read or written one by one."""
    return getattr(weight, "quant_state", None) is not None or not weight.is_floating_point()


def full_weight(weight: Any) -> Tensor:
    """Return a weight (out, in) dequantised and gathered; if it is sharded, all processes must call this together."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    return dequantize_bnb_weight(weight) if is_quantised(weight) else weight


def num_held(weight: Any) -> int:
    """Count the entries of a weight that this process holds, packed ones included."""
    if isinstance(weight, DTensor):
        return weight.to_local().numel()
    return weight.quant_state.shape.numel() if is_quantised(weight) else weight.numel()
