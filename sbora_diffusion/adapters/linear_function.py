"""The forward and backward pass of a linear layer with SBoRA adapters, as one autograd Function."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

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
    dtype of the base layer's output. The backward pass keeps the gathered columns of x for FA, x itself for FB, and
    only where a gradient is asked for. The base layer is taken to be frozen.

    Args:
        x: (..., in).
        base_layer: a linear layer with a plain floating-point weight, or a bitsandbytes Linear4bit.
        fa_index: (r,) int64 columns, with fa_weight (out, r), scale included. None for both: no FA adapter.
        fb_index: (r,) int64 rows, with fb_weight (r, in), scale included. None for both: no FB adapter.

    Returns:
        (..., out).
    """
    if not torch.is_grad_enabled():  # a small layer costs hardly more than the bookkeeping of a Function
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
    """The output, and the gathered columns of x (tokens, r) if there is an FA adapter."""
    y = base_layer(x)
    rows = y.reshape(-1, y.shape[-1])  # (tokens, out)
    gathered = None
    if fa_index is not None and fa_weight is not None:
        gathered = gathered_inputs(x, fa_index, y.dtype)
        rows.addmm_(gathered, fa_weight.to(y.dtype).t())
    if fb_index is not None and fb_weight is not None:
        with without_autocast(y.device.type):  # a quantised layer answers in its input's dtype, a product would not
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
    """Within it nothing is cast by itself. Autocast is off in most backward passes, and this asks before it acts."""
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def gathered_inputs(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns `index` (r,) of x (..., in), as rows (tokens, r) of `dtype`."""
    return x.index_select(-1, index).reshape(-1, len(index)).to(dtype)


def factor_gradient(side: Side, grad: Tensor, kept: Tensor, index: Tensor) -> Tensor:
    """The gradient of the trained factor: (out, r) for fa, (r, in) for fb.

    Args:
        grad: (tokens, out), of the layer's output.
        kept: the gathered inputs (..., r) for fa, the inputs (..., in) for fb.
    """
    if side == "fa":
        return _narrow_product(grad.t(), _rows(kept).t().to(grad.dtype))
    return grad.index_select(-1, index).t() @ _rows(kept).to(grad.dtype)


def add_to_input_gradient(side: Side, grad_x: Tensor, grad: Tensor, factor: Tensor, index: Tensor) -> None:
    """Add, in place, what an adapter contributes to grad_x (tokens, in), given grad (tokens, out)."""
    factor = factor.to(grad.dtype)
    if side == "fa":
        grad_x.index_add_(-1, index, _narrow_product(grad, factor.t()))
    else:
        grad_x.addmm_(grad.index_select(-1, index), factor)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _narrow_product(rows: Tensor, factor: Tensor) -> Tensor:
    """rows (n, k) @ factorᵀ (k, r), r small, as (factor @ rowsᵀ)ᵀ: BLAS on CPUs is up to eight times faster at that."""
    return (factor @ rows.t()).t()


def overwrite(weight: Tensor, dim: int, index: Tensor, values: Tensor, places: Tensor | None = None) -> None:
    """Put values (r, in) into the rows `index` of a weight (out, in), or (out, r) into its columns if `dim` is 1.

    Args:
        places: `column_places(weight, index)`, if it is known.
    """
    if dim == 0:
        weight.index_copy_(0, index, values)
    else:  # two to three times faster than index_copy_ on CPUs
        weight.scatter_(1, column_places(weight, index) if places is None else places, values)


def column_places(weight: Tensor, index: Tensor) -> Tensor:
    """The columns `index` (r,) of each row of a weight (out, in): a view (out, r)."""
    return index.expand(weight.shape[0], -1)


def is_quantised(weight: Tensor) -> bool:
    """Whether the entries of a weight cannot be read or written one by one."""
    return getattr(weight, "quant_state", None) is not None or not weight.is_floating_point()
