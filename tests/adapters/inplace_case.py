"""One linear layer that is trained in place."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.layer import attach

from .tiny import perturb


class Case:
    """One linear layer (12 to 10) with one adapter of rank 3, and what is in its weight."""

    def __init__(self, side: Side, bias: bool = True, alpha: int = 3, dtype: torch.dtype = torch.float64) -> None:
        self.model: Any = get_peft_model(
            nn.Sequential(nn.Linear(12, 10, bias=bias)),  # pyright: ignore[reportArgumentType]
            LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"]),
        ).to(dtype)
        ((_, self.layer),) = attach(self.model, "default", side, Interval(2, 3), 0).items()
        perturb([self.layer.trained], std=0.5)
        self.base: Any = self.layer.module.get_base_layer()
        self.original = self.base.weight.detach().clone()

    def dense(self, x: Tensor) -> Tensor:
        """The plain LoRA formula, with both factors multiplied out."""
        a, b = self.layer.module.lora_A["default"], self.layer.module.lora_B["default"]
        assert isinstance(a, nn.Linear)
        assert isinstance(b, nn.Linear)
        weight = self.original + self.layer.scaling * (b.weight @ a.weight)
        return nn.functional.linear(x, weight, self.base.bias)
