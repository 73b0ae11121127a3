"""Weights that are not held as they are: in shares of several processes, or in four bits."""

from typing import Any

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor
from torch.distributed.tensor import DTensor

from sbora_diffusion.adapters.linear_function import is_quantised


def whole(weight: Any) -> Tensor:
    """A weight (out, in) in floating point; of a share, every process has to ask for it."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    return dequantize_bnb_weight(weight) if is_quantised(weight) else weight


def num_held(weight: Any) -> int:
    """How many of a weight's entries this process holds, packed ones too."""
    if isinstance(weight, DTensor):
        return weight.to_local().numel()
    return weight.quant_state.shape.numel() if is_quantised(weight) else weight.numel()
