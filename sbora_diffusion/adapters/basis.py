"""Assign columns (or rows) of each layer to owners: intervals of one seeded permutation per layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sbora_diffusion.utils.errors import SboraError

Side = Literal["fa", "fb"]

_WRAPPERS = ("base_layer", "_orig_mod")  # path components that PEFT and torch.compile insert


@dataclass(frozen=True, order=True)
class Interval:
    """Positions [start, start + rank) of every layer's permutation, written "start:stop" like a Python slice."""

    start: int
    rank: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.rank < 1:
            raise SboraError(f"interval {self} is empty or negative, needs 0 <= start < stop")

    @property
    def stop(self) -> int:
        return self.start + self.rank

    def overlaps(self, other: "Interval") -> bool:
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """Parse the output of `str`: "8:16" is Interval(start=8, rank=8)."""
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
        if match is None:
            raise SboraError(f"got interval {text!r}, expected start:stop such as 8:16")
        start, stop = int(match[1]), int(match[2])
        return cls(start, stop - start)


@lru_cache(maxsize=16384)  # switching a concept looks up the names of all layers
def canonical(layer: str) -> str:
    """Return a layer's name without the wrappers of PEFT, torch.compile, or transformers before 5.6.

    `base_model.model.text_model.encoder.layers.0.mlp.fc1.base_layer` becomes `encoder.layers.0.mlp.fc1`.
    """
    parts = [part for part in layer.split(".") if part not in _WRAPPERS]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    if parts[:1] == ["text_model"]:
        parts = parts[1:]
    return ".".join(parts)


def permutation(layer: str, dim: int, seed: int) -> Tensor:
    """Return the order in which a layer's columns (FA) or rows (FB) are assigned, the same on every machine.

    Args:
        layer: the layer's name, canonical or not.
        dim: the number of columns or rows.

    Returns:
        (dim,) int64, a permutation of 0 … dim - 1: the stable argsort of `dim` raw 64-bit words of the counter-based
        generator Philox4x64-10, keyed by blake2b of seed and layer.
    """
    return torch.from_numpy(_permutation(canonical(layer), dim, seed).copy())


@lru_cache(maxsize=4096)
def _permutation(layer: str, dim: int, seed: int) -> np.ndarray:
    key = blake2b(f"{seed}/{layer}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(dim)
    return np.argsort(words, kind="stable")


def indices(layer: str, dim: int, interval: Interval, seed: int) -> Tensor:
    """Return the columns (FA) or rows (FB) of a layer for an interval: (rank,) int64, in permutation order."""
    if interval.stop > dim:
        raise SboraError(
            f"interval {interval} does not fit layer {canonical(layer)}, which has the positions 0:{dim}",
            hint="Choose a smaller rank or an earlier interval.",
        )
    return permutation(layer, dim, seed)[interval.start : interval.stop].clone()


def capacity(dims: Iterable[int], rank: int) -> int:
    """Return how many disjoint adapters of one rank fit into the narrowest layer."""
    return min(dims) // rank


def first_free(taken: Iterable[Interval], rank: int, width: int) -> Interval:
    """Return the first gap of `rank` positions below `width`.

    Raises:
        SboraError: there is none.
    """
    start = 0
    for interval in sorted(taken):
        if start + rank <= interval.start:
            break
        start = max(start, interval.stop)
    if rank > width:
        raise SboraError(f"got rank {rank}, expected at most {width}, the number of positions")
    if start + rank > width:
        raise SboraError(
            f"no {rank} consecutive positions are free ({width} in all)",
            hint="Remove an adapter, choose a smaller rank, or use another folder of adapters.",
        )
    return Interval(start, rank)
