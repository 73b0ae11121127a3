"""Settings as frozen dataclasses: allowed values and help stand beside each field, unknown keys are errors.

A config is a dataclass whose fields are settings, or groups of settings that are dataclasses themselves. Keys are
unique across groups, so that `--set key=value` needs no group.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from sbora_diffusion.utils.errors import SboraError, guess
from sbora_diffusion.utils.text import in_words

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting may be."""

    low: float
    high: float = float("inf")
    low_is_allowed: bool = True
    high_is_allowed: bool = False
    words: str

    def __contains__(self, value: float) -> bool:
        return (self.low < value or (self.low_is_allowed and value == self.low)) and (
            value < self.high or (self.high_is_allowed and value == self.high)
        )


POSITIVE = Range(low=0, low_is_allowed=False, words="a number greater than 0")
NATURAL = Range(low=0, words="a number from 0 on")
SHARE = Range(low=0, high=1, high_is_allowed=True, words="a number from 0 to 1")


def setting(text: str, allowed: Range | None = None, key: str = "") -> Any:
    """Declare a setting: what it does, in one line, and for a number which ones are allowed.

    Args:
        key: its name for `--set` and in files where that is not the attribute's.
    """
    return dataclasses.field(metadata={"help": text, "range": allowed, "key": key})


@dataclass(frozen=True)
class Setting:
    """One setting of a config: the group that it is in ("" for none), its type, allowed numbers and help."""

    key: str
    attribute: str
    group: str
    kind: Any
    allowed: Range | None
    help: str

    def parse(self, text: str) -> Any:
        """Convert the text of `--set key=text`; a list is separated by semicolons."""
        if get_origin(self.kind) is tuple:
            return tuple(part.strip() for part in text.split(";") if part.strip())
        if self.kind is bool:
            if text.lower() not in _TRUE + _FALSE:
                raise SboraError(f"got {self.key}={text}, expected true or false")
            return text.lower() in _TRUE
        if get_origin(self.kind) is Literal:
            return text
        try:
            return self.kind(text)
        except ValueError:
            raise SboraError(f"got {self.key}={text}, expected {in_words(self.kind)}") from None

    def coerce(self, value: Any) -> Any:
        """Convert a value of a TOML or JSON file: lists become tuples, 0 and 1 of older files booleans."""
        if get_origin(self.kind) is tuple:
            if not isinstance(value, list | tuple) or not all(isinstance(v, get_args(self.kind)[0]) for v in value):
                raise SboraError(f"got {self.key}={value!r}, expected a list of texts")
            return tuple(value)
        if self.kind is bool and type(value) is int and value in (0, 1):
            return bool(value)
        if self.kind is float and type(value) is int:
            return float(value)
        kind = str if get_origin(self.kind) is Literal else self.kind
        if type(value) is not kind:
            raise SboraError(f"got {self.key}={value!r}, expected {in_words(kind)}")
        return value

    def check(self, value: Any) -> None:
        """Raise SboraError if the value is not allowed."""
        if get_origin(self.kind) is Literal and value not in get_args(self.kind):
            raise SboraError(f"got {self.key}={value}, choose from {', '.join(get_args(self.kind))}")
        if self.allowed is not None and value not in self.allowed:
            raise SboraError(f"got {self.key}={value}, expected {self.allowed.words}")


@cache
def settings_of(config: type) -> dict[str, Setting]:
    """List the settings of a config class by key, those of its groups included, in order."""
    return {one.key: one for one in _settings(config, "")}


def _settings(config: type, group: str) -> Iterator[Setting]:
    kinds = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _settings(kind, field.name)
        else:
            about = field.metadata
            yield Setting(about["key"] or field.name, field.name, group, kind, about["range"], about["help"])


class Config:
    """What all configs can do; a subclass is a frozen dataclass."""

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> Self:
        """Build a config from exactly its keys, each of its type and in its range.

        Raises:
            SboraError: a missing or an unknown key, a value of another type or out of range.
        """
        known = settings_of(cls)
        missing, unknown = sorted(known.keys() - flat), sorted(flat.keys() - known)
        if missing or unknown:
            raise SboraError(f"recipe lacks {missing} and has the unknown keys {unknown}", f"known: {', '.join(known)}")
        values: dict[str, Any] = {}
        for key, value in flat.items():
            one = known[key]
            (values.setdefault(one.group, {}) if one.group else values)[one.attribute] = one.coerce(value)
        kinds = get_type_hints(cls)
        made = cls(**{k: kinds[k](**v) if dataclasses.is_dataclass(kinds[k]) else v for k, v in values.items()})
        made.check()
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by key, ready for JSON; the inverse of `from_dict`."""
        values = {key: self[key] for key in settings_of(type(self))}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def with_settings(self, **changes: Any) -> Self:
        """Return a copy with other values for some keys, checked as a whole."""
        return self.from_dict(self.to_dict() | changes)

    def __getitem__(self, key: str) -> Any:
        one = settings_of(type(self))[key]
        return getattr(getattr(self, one.group) if one.group else self, one.attribute)

    def check(self) -> None:
        """Raise SboraError for the first value that is out of range; subclasses add what must fit together."""
        for key, one in settings_of(type(self)).items():
            one.check(self[key])


def parse_overrides(config: type, overrides: Mapping[str, str], aliases: Mapping[str, str] = {}) -> dict[str, Any]:
    """Convert the texts of `--set` to values of a config class.

    Args:
        aliases: older keys that are still understood -> the current ones.

    Raises:
        SboraError: an unknown key (with the nearest known ones), a text that is no value of the setting's type.
    """
    known, values = settings_of(config), {}
    for key, text in overrides.items():
        current = aliases.get(key, key)
        if current not in known:
            raise SboraError(f"got unknown setting {key!r}", f"{guess(key, known)}choose from {', '.join(known)}")
        values[current] = known[current].parse(text)
    return values


def flatten(config: type, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a TOML recipe without its tables.

    Raises:
        SboraError: a key that stands in another group's table.
    """
    known, flat = settings_of(config), {}
    for name, value in tables.items():
        if not isinstance(value, dict):
            flat[name] = value
            continue
        for key in value:
            if key in known and known[key].group != name:
                raise SboraError(f"{key} stands in [{name}]", f"move it to [{known[key].group}]")
        flat |= value
    return flat
