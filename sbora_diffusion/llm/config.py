"""The settings of a fine-tuning in their groups, and the recipes that they start from."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, Self

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.recipes.schema import NATURAL, POSITIVE, Config, Range, flatten, parse_overrides, setting
from sbora_diffusion.utils.errors import SboraError

_SIDES: dict[str, Side | None] = {"lora": None, "dora": None, "sbora-fa": "fa", "sbora-fb": "fb"}
METHODS = tuple(_SIDES)
_PROBABILITY = Range(low=0, high=1, words="a number from 0 to below 1")
_SEED = Range(low=0, high=2**32, words=f"a number from 0 to {2**32 - 1}")
_RECIPES = files("sbora_diffusion") / "recipes" / "llm"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The adapter."""

    rank: int = setting("rank of each adapted layer", POSITIVE)
    alpha: float = setting("the adapter's scale is alpha / rank", POSITIVE)
    dropout: float = setting("probability of dropout on the adapter's input", _PROBABILITY)
    targets: tuple[str, ...] = setting("names of the adapted linear layers, separated by semicolons")
    basis_seed: int = setting("seed of the layers' permutations", NATURAL)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How records become batches."""

    template: Literal["adapters", "alpaca", "chat", "plain"] = setting(
        "the prompt around an instruction, or the tokenizer's chat template"
    )
    cutoff: int = setting("maximum tokens of a sequence; with target_cutoff, of its prompt", POSITIVE)
    target_cutoff: int = setting("maximum tokens of the answer; 0: cutoff includes it", NATURAL)
    train_on_inputs: bool = setting("include the prompt's tokens in the loss")
    batch_size: int = setting("sequences per step and process", POSITIVE)
    sampling: Literal["random", "group_by_length"] = setting("order of the sequences")
    validation: int = setting("records held out", NATURAL)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How the base model computes."""

    dtype: Literal["float32", "bfloat16", "float16"] = setting("of the arithmetic; mixed precision except float32")
    gradient_checkpointing: bool = setting("less memory, more time")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the parameters are updated."""

    epochs: float = setting("passes over the records; used if steps is 0", NATURAL)
    steps: int = setting("optimiser steps", NATURAL)
    accumulation: int = setting("batches per optimiser step", POSITIVE)
    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adafactor",
        "lion_32bit",
        "lion_8bit",
        "sgd",
    ] = setting("name in transformers; without a GPU, a paged AdamW becomes adamw_torch")
    learning_rate: float = setting("of the adapter", POSITIVE)
    scheduler: Literal["linear", "constant", "cosine"] = setting("of the learning rate after the warm-up")
    warmup_steps: int = setting("steps over which the learning rate rises", NATURAL)
    weight_decay: float = setting("of the optimiser", NATURAL)
    max_grad_norm: float = setting("gradients are clipped to this norm", POSITIVE)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written while training."""

    eval_every: int = setting("optimiser steps between validation losses; 0: none", NATURAL)
    save_every: int = setting("optimiser steps between checkpoints", POSITIVE)


@dataclass(frozen=True, kw_only=True)
class LlmConfig(Config):
    """Everything that decides a fine-tuning except the base model, the data and the method."""

    seed: int = setting("of all random numbers", _SEED)
    method: MethodConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    output: OutputConfig

    def check(self) -> None:
        """Raise SboraError for the first setting that is not allowed, or does not fit another one."""
        super().check()
        if not self.optim.steps and not self.optim.epochs:
            raise SboraError("got steps=0 and epochs=0, expected one of them to be positive")
        if not self.method.targets:
            raise SboraError("got no targets, expected names of linear layers", "--set 'targets=q_proj;v_proj'")

    @classmethod
    def from_recipe(cls, recipe: str, overrides: Mapping[str, str]) -> Self:
        """Read a recipe and apply the overrides of `--set`.

        Raises:
            SboraError: an unknown recipe or setting, or a value that is not allowed.
        """
        if recipe not in recipes():
            raise SboraError(f"got unknown recipe {recipe!r}, choose from {', '.join(recipes())}")
        tables = tomllib.loads((_RECIPES / f"{recipe}.toml").read_text())
        return cls.from_dict(flatten(cls, tables) | parse_overrides(cls, overrides))


def side_of(method: str) -> Side | None:
    """Return the side of an SBoRA method, None for other methods.

    Raises:
        SboraError: an unknown method.
    """
    if method not in _SIDES:
        raise SboraError(f"got unknown method {method!r}, choose from {', '.join(METHODS)}")
    return _SIDES[method]


def recipes() -> list[str]:
    """List the names of the recipes."""
    return sorted(entry.name.removesuffix(".toml") for entry in _RECIPES.iterdir())
