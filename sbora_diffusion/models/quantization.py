"""Frozen weights in four bits: bitsandbytes' nf4 (Dettmers et al. 2023, QLoRA, section 3)."""

from typing import Any

import torch
from torch import nn

from sbora_diffusion.models.families.base import repeated_blocks
from sbora_diffusion.utils.errors import SboraError

DTYPE = torch.bfloat16  # of the layers' arithmetic
BYTES = 0.516  # per weight: four bits, and the scales of blocks of 64, which are quantized, too


def to_nf4(model: Any) -> None:
    """Replace the linear layers of a model's repeated blocks by nf4 layers, which quantize when they are moved.

    The model is of diffusers or transformers, in `DTYPE`, on the CPU. Other layers (embeddings, the first and the last
    layer) stay as they are, and so do those that the model's own library keeps in fp32.

    Raises:
        SboraError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError:
        raise SboraError("precision=nf4 needs the package bitsandbytes", "pip install bitsandbytes") from None
    for name, layer in packable(model).items():
        shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        packed: Any = Linear4bit(*shape, has_bias, DTYPE, quant_type="nf4", device="meta")
        packed.weight = Params4bit(layer.weight.data, quant_type="nf4", module=packed)  # type: ignore[call-arg]
        packed.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, packed.eval())
    model.is_loaded_in_4bit = True  # from which PEFT chooses its layer classes


def packable(model: Any) -> dict[str, nn.Linear]:
    """Return the layers that `to_nf4` replaces, or has replaced, by name."""
    kept, blocks = tuple(model._keep_in_fp32_modules or ()), tuple(f"{name}." for name in repeated_blocks(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and name.rpartition(".")[2] not in kept
    }
