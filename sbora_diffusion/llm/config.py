"""The settings of a language model's fine-tuning: a readable recipe, and what the user sets over it."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import Any, Literal, get_args

from sbora_diffusion.llm.template import TEMPLATES
from sbora_diffusion.utils.errors import SboraError, guess
from sbora_diffusion.utils.text import in_words

Method = Literal["lora", "dora", "sbora-fa", "sbora-fb"]
METHODS: tuple[Method, ...] = get_args(Method)
RECIPES: tuple[str, ...] = ("commonsense", "arithmetic", "qsbora", "small")
_CHOICES: dict[str, tuple[str, ...]] = {
    "template": TEMPLATES,
    "dtype": ("float32", "bfloat16", "float16"),
    "scheduler": ("linear", "constant", "cosine"),
    "sampling": ("random", "group_by_length"),
    "optimizer": (
        *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
        *("adafactor", "lion_32bit", "lion_8bit", "sgd"),
    ),
}
_POSITIVE = ("rank", "alpha", "batch_size", "accumulation", "learning_rate", "cutoff", "max_grad_norm", "save_every")
_NATURAL = ("epochs", "steps", "warmup_steps", "dropout", "target_cutoff", "weight_decay", "validation", "eval_every")


@dataclass(frozen=True, kw_only=True)
class LlmConfig:
    """Everything that decides a fine-tuning besides base model, data and method."""

    rank: int
    alpha: float  # the adapter's scale is alpha / rank
    dropout: float  # on the adapter's input
    targets: tuple[str, ...]  # names of linear layers
    epochs: float  # used when steps is 0
    steps: int  # optimiser steps
    batch_size: int  # sequences a step, of one process
    accumulation: int  # batches to one optimiser step
    learning_rate: float
    scheduler: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    optimizer: str  # transformers' name; a paged one becomes its plain twin without a GPU
    template: str
    cutoff: int  # tokens; with target_cutoff, of the prompt alone
    target_cutoff: int  # tokens of the answer; 0 counts it into cutoff
    train_on_inputs: bool  # whether the prompt's tokens count in the loss
    sampling: str
    validation: int  # records held out
    eval_every: int  # optimiser steps between losses of these; 0 for none
    save_every: int  # optimiser steps between checkpoints
    dtype: str  # the arithmetic; a mixed precision where it is not float32
    gradient_checkpointing: bool
    basis_seed: int  # of the layers' permutations
    seed: int

    def __post_init__(self) -> None:
        for key in _POSITIVE + _NATURAL:
            value, sign = getattr(self, key), "positive" if key in _POSITIVE else "non-negative"
            if not 0 <= value < float("inf") or (key in _POSITIVE and value == 0):
                raise SboraError(f"got {key}={value}, expected a {sign} number")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise SboraError(f"got {key}={getattr(self, key)}, choose from {', '.join(choices)}")
        if not 0 <= self.seed < 2**32:
            raise SboraError(f"got seed={self.seed}, expected 0 to {2**32 - 1}")
        if not self.steps and not self.epochs:
            raise SboraError("got steps=0 and epochs=0, expected one of them to be positive")
        if self.dropout >= 1 or not self.targets:
            raise SboraError(f"got dropout={self.dropout} and {len(self.targets)} targets, expected < 1 and at least 1")

    @classmethod
    def from_recipe(cls, recipe: str, overrides: Mapping[str, str]) -> "LlmConfig":
        """A recipe of ours with `overrides` ("key": "value", lists separated by semicolons) over it."""
        if recipe not in RECIPES:
            raise SboraError(f"got unknown recipe {recipe!r}, choose from {', '.join(RECIPES)}")
        text = (files("sbora_diffusion.llm") / "recipes" / f"{recipe}.toml").read_text()
        return cls.from_dict(tomllib.loads(text) | {key: _parse(key, value) for key, value in overrides.items()})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "LlmConfig":
        """Exactly the known keys, each of its type."""
        kinds = _kinds()
        missing, unknown = sorted(kinds.keys() - settings), sorted(settings.keys() - kinds)
        if missing or unknown:
            raise SboraError(f"recipe lacks {missing} and has the unknown keys {unknown}", f"known: {', '.join(kinds)}")
        return cls(**{key: _coerce(key, value, kinds[key]) for key, value in settings.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the inverse of `from_dict`."""
        return asdict(self) | {"targets": list(self.targets)}


def _kinds() -> dict[str, Any]:
    return {field.name: field.type for field in fields(LlmConfig)}


def _parse(key: str, text: str) -> Any:
    kind = _kinds().get(key)
    if kind is None:
        raise SboraError(f"got unknown setting {key!r}", f"{guess(key, _kinds())}choose from {', '.join(_kinds())}")
    if kind not in (int, float, bool, str):
        return [part.strip() for part in text.split(";") if part.strip()]
    if kind is bool:
        if text not in ("true", "false"):
            raise SboraError(f"got {key}={text}, expected true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise SboraError(f"got {key}={text}, expected {in_words(kind)}") from None


def _coerce(key: str, value: Any, kind: Any) -> Any:
    if kind not in (int, float, bool, str):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SboraError(f"got {key}={value!r}, expected a list of texts")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise SboraError(f"got {key}={value!r}, expected {in_words(kind)}")
    return value
