"""Assign columns (or rows) of each layer to owners: intervals of one seeded permutation; and describe an adapter."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import parse_json, with_current_names

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


FORMAT = 1  # SBoRA adapters
FORMAT_OF_METHODS = 2  # adapters of other methods: two more keys

_TYPES: dict[str, type] = {
    **dict.fromkeys(("format", "rank", "seed"), int),
    **dict.fromkeys(("name", "side", "base_id", "base_fingerprint"), str),
    **dict.fromkeys(("intervals", "parents"), list),
    **dict.fromkeys(("tokens", "recipe", "versions", "metrics"), dict),
}
_TYPES_OF_METHODS = _TYPES | {"method": str, "embedding_layers": int}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything about an adapter except its tensors: the file's metadata, as one JSON object."""

    side: Side
    rank: int  # the largest number of columns or rows of any layer
    intervals: tuple[Interval, ...]  # one for a trained concept, several for a merge, none for a foreign LoRA
    seed: int
    base_id: str
    base_fingerprint: str
    tokens: dict[str, str]  # token -> class noun, {"<dog>": "dog"}
    name: str
    parents: tuple[str, ...] = ()  # names of the adapters that it was merged from
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    method: str = ""  # "": SBoRA of this side; for other methods the side matters only if they own an interval
    embedding_layers: int = 0  # cross-attention layers for which tokens have separate embeddings; 0: shared by all

    def __post_init__(self) -> None:
        if self.format not in (FORMAT, FORMAT_OF_METHODS):
            known = f"this version reads {FORMAT} and {FORMAT_OF_METHODS}"
            raise SboraError(f"got format {self.format}, {known}", hint="Update sbora-diffusion.")
        if bool(self.method) != (self.format == FORMAT_OF_METHODS) or self.embedding_layers < 0:
            raise SboraError(
                f"got format {self.format} with method {self.method!r} and {self.embedding_layers} embedding layers"
            )
        if self.side not in ("fa", "fb"):
            raise SboraError(f"got side {self.side!r}, expected 'fa' or 'fb'")
        if self.rank < 1:
            raise SboraError(f"got rank {self.rank}, expected at least 1")
        for text in (self.name, self.method_name, *self.parents, *self.tokens, *self.tokens.values()):
            if not text or not text.isprintable():
                raise SboraError(f"got {text!r} for a name or a token, expected printable characters")
        check_file_name(self.name)
        if not (self.base_id.isprintable() and self.base_fingerprint.isprintable()):
            raise SboraError("base id or fingerprint has characters that cannot be printed")

    @property
    def method_name(self) -> str:
        """The method's full name, such as sbora-fa or lora."""
        return self.method or f"sbora-{self.side}"

    def to_json(self) -> str:
        fields = {**asdict(self), "intervals": [str(interval) for interval in self.intervals]}
        if self.format == FORMAT:
            fields = {key: value for key, value in fields.items() if key in _TYPES}
        try:
            return json.dumps(fields, allow_nan=False, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise SboraError(f"recipe, versions or metrics cannot be written as JSON ({error})") from None

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """Parse the output of `to_json`; every key must be present, known and of its type."""
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise SboraError(f"the sbora metadata is not JSON ({error})") from None
        types = _TYPES_OF_METHODS if isinstance(fields, dict) and "method" in fields else _TYPES
        if not isinstance(fields, dict) or fields.keys() != types.keys():
            raise SboraError(f"the sbora metadata must have exactly the keys {', '.join(types)}")
        for key, kind in types.items():
            if type(fields[key]) is not kind:
                raise SboraError(f"metadata {key} is {type(fields[key]).__name__}, expected {kind.__name__}")
        for key in ("intervals", "parents", "tokens"):
            texts = fields[key].values() if key == "tokens" else fields[key]
            if not all(isinstance(value, str) for value in texts):
                raise SboraError(f"metadata {key} must consist of strings")
        intervals, recipe = tuple(map(Interval.parse, fields["intervals"])), with_current_names(fields["recipe"])
        return cls(**{**fields, "intervals": intervals, "parents": tuple(fields["parents"]), "recipe": recipe})


def check_file_name(name: str) -> None:
    """Raise SboraError unless a concept's name is valid as the name of a file or folder."""
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise SboraError(f"got the name {name!r}, expected a name without slashes and leading dots")
