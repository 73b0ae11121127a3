"""Orthogonal Adaptation (Po et al. 2024): LoRA whose input side is frozen rows of a shared orthogonal matrix."""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.methods.lora import AVERAGE, SUM
from sbora_diffusion.methods.registry import ADAPTER, Injected, Injection, Method
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError

SUM_WEIGHT = 0.6  # the paper sums at this strength


def inject(into: Injection) -> AbstractContextManager[Injected]:
    """Inject a LoRA; the concept's name selects the frozen rows."""
    from sbora_diffusion.methods.live import inject_tuners, lora_config, read_lora

    def prepare(key: str, tuner: Any) -> None:
        _set_basis(tuner, f"{into.concept}/{into.config.seed}/{key}", into.config)

    return inject_tuners(into, lambda names: lora_config(into.rank, names), read_lora, prepare)


@torch.no_grad()
def _set_basis(tuner: Any, key: str, config: TrainConfig) -> None:
    """Set A to `rank` random rows of the orthogonal matrix that all layers of this input width share, and freeze it."""
    down, rank = tuner.lora_A[ADAPTER], config.method.rank
    width = down.weight.shape[1]
    if rank > width:
        raise SboraError(f"got rank={rank}, but a layer has {width} inputs, so there are {width} orthogonal rows")
    seed = int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "little")
    rows = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:rank]
    down.weight.copy_(orthogonal_matrix(width, config.method.basis_seed)[rows])
    down.weight.requires_grad_(False)


@cache
def orthogonal_matrix(width: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix (width, width) float32, the same for every concept of a seed."""
    generator = torch.Generator().manual_seed(seed * 100_003 + width)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.float()


METHODS = (
    Method(
        name="orthogonal",
        inject=inject,
        layer_size=lambda shape, config: config.method.rank * shape[0],
        merges={"sum": replace(SUM, weight=lambda _: SUM_WEIGHT), "average": AVERAGE},
    ),
)
