"""The metadata of a concept file, as one JSON object."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import with_current_names

FORMAT = 1  # SBoRA adapters
FORMAT_OF_METHODS = 2  # adapters of other methods: two more keys


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything about an adapter except its tensors."""

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
            raise SboraError(
                f"got format {self.format}, this version reads {FORMAT} and {FORMAT_OF_METHODS}",
                hint="Update sbora-diffusion.",
            )
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
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SboraError(f"the sbora metadata is not JSON ({error})") from None
        types = _TYPES | (_TYPES_OF_METHODS if isinstance(fields, dict) and "method" in fields else {})
        if not isinstance(fields, dict) or fields.keys() != types.keys():
            raise SboraError(f"the sbora metadata must have exactly the keys {', '.join(types)}")
        for key, kind in types.items():
            if type(fields[key]) is not kind:
                raise SboraError(f"metadata {key} is {type(fields[key]).__name__}, expected {kind.__name__}")
        _check_texts("intervals", fields["intervals"])
        _check_texts("parents", fields["parents"])
        _check_texts("tokens", fields["tokens"].values())
        fields["intervals"] = tuple(map(Interval.parse, fields["intervals"]))
        fields["parents"] = tuple(fields["parents"])
        fields["recipe"] = with_current_names(fields["recipe"])
        return cls(**fields)


def check_file_name(name: str) -> None:
    """Raise SboraError unless a concept's name is valid as the name of a file or folder."""
    if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
        raise SboraError(f"got the name {name!r}, expected a name without slashes and leading dots")


_TYPES: dict[str, type] = {
    "format": int,
    "name": str,
    "side": str,
    "rank": int,
    "intervals": list,
    "seed": int,
    "base_id": str,
    "base_fingerprint": str,
    "tokens": dict,
    "parents": list,
    "recipe": dict,
    "versions": dict,
    "metrics": dict,
}
_TYPES_OF_METHODS: dict[str, type] = {"method": str, "embedding_layers": int}


def _check_texts(key: str, values: Iterable[Any]) -> None:
    if not all(isinstance(value, str) for value in values):
        raise SboraError(f"metadata {key} must consist of strings")
