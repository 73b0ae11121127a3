"""The repeated blocks of a model of diffusers or transformers, as these libraries name them."""

from typing import Any

from torch import nn


def repeated_blocks(model: Any) -> dict[str, nn.Module]:
    """By name, outer ones before those within them."""
    kinds = set(model._no_split_modules or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
