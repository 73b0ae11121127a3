"""The settings of a training: a readable recipe per base model and method, and what the user sets over it."""

import tomllib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import Any, get_args, get_origin

from sbora_diffusion.errors import SboraError
from sbora_diffusion.methods import find_method


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training besides the pictures, the base model and the interval."""

    method: str
    rank: int  # columns or rows of each adapted layer
    steps: int
    batch_size: int  # pictures a step
    learning_rate: float  # of the U-Net's adapter
    text_encoder_learning_rate: float
    token_learning_rate: float
    token_vectors: int  # embeddings of the concept's token
    layerwise_tokens: int  # 1: its own ones for each cross-attention layer (P+)
    warmup_steps: int
    final_rate: float  # the learning rates' last value, as a fraction of the first
    max_grad_norm: float
    caption_dropout: float  # probability of the empty caption, for classifier-free guidance
    crops: int  # encoded variants of each picture
    smallest_crop: float  # the smallest variant's side, as a fraction of the picture's
    prior_batch: int  # samples a step that hold the base model's own answers in place
    prior_weight: float
    prior_prompts: tuple[str, ...]  # what else the base model's answers are held for
    quiet_weight: float  # of the adapter's loudness on the prior prompts' inputs
    erasure_weight: float  # the same on each step's own prior samples (BlockLoRA)
    preview_every: int  # steps; 0 for none
    save_every: int  # steps between checkpoints
    eval_every: int  # steps between scores of the preview prompts' pictures; 0 for none
    eval_encoder: str  # who gives them: see evaluation.encoders.load_encoder
    keep: str  # "last": the result is the last step's; "best": that of the best scored step
    sampling_steps: int
    guidance: float
    preview_prompts: tuple[str, ...]  # {token} stands for the concept's
    seed: int
    basis_seed: int  # of the layers' permutations; concepts of different basis seeds may share columns

    def __post_init__(self) -> None:
        kind = find_method(self.method).kind
        if kind not in ("fa", "fb") and (self.quiet_weight or self.erasure_weight):
            raise SboraError(f"quiet_weight and erasure_weight are for columns and rows, {self.method} has neither")
        if self.erasure_weight and not self.prior_batch:
            raise SboraError("erasure_weight needs prior samples", "--set prior_batch=4")
        if self.layerwise_tokens not in (0, 1):
            raise SboraError(f"got layerwise_tokens={self.layerwise_tokens}, expected 0 or 1")
        positive = ("rank", "token_vectors", "steps", "batch_size", "crops", "save_every", "sampling_steps")
        positive += ("learning_rate",)
        natural = (
            "warmup_steps",
            "prior_batch",
            "preview_every",
            "eval_every",
            "seed",
            "basis_seed",
            "prior_weight",
            "quiet_weight",
            "erasure_weight",
            "guidance",
        )
        natural += ("text_encoder_learning_rate", "token_learning_rate")
        for key in positive + natural:
            value = getattr(self, key)
            if not 0 <= value < float("inf") or (key in positive and value == 0):
                raise SboraError(
                    f"got {key}={value}, expected a {'positive ' if key in positive else ''}number from 0 on"
                )
        for key in ("caption_dropout", "final_rate", "smallest_crop"):
            if not 0 <= getattr(self, key) <= 1:
                raise SboraError(f"got {key}={getattr(self, key)}, expected a number from 0 to 1")
        if self.max_grad_norm <= 0 or self.smallest_crop == 0:
            raise SboraError("max_grad_norm and smallest_crop must be greater than 0")
        if self.keep not in ("last", "best") or (self.keep == "best" and not self.eval_every):
            raise SboraError(
                f"got keep={self.keep} with eval_every={self.eval_every}, expected last, or best with scores",
                "such as --set keep=best --set eval_every=50",
            )
        if not self.preview_prompts or not all("{token}" in prompt for prompt in self.preview_prompts):
            raise SboraError(f"got preview_prompts={list(self.preview_prompts)}, expected texts that contain {{token}}")

    @classmethod
    def from_recipe(cls, base: str, method: str, overrides: Mapping[str, str]) -> "TrainConfig":
        """The recipe of a base and method (or the default one) with `overrides` ("key": "value") over it.

        Args:
            base: "emoji64" or the name of a family, as `loading.recipe_base` knows it of every base model.
        """
        find_method(method)
        recipe = f"{base}-{method}"
        if not (_RECIPES / f"{recipe}.toml").is_file():
            recipe = f"default-{method}"
        settings = _read_recipe(recipe) | {"method": method}
        return cls.from_dict(settings | {key: _parse(key, text) for key, text in overrides.items()})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "TrainConfig":
        """Exactly the known keys, each of its type."""
        kinds = {field.name: field.type for field in fields(cls)}
        missing, unknown = sorted(kinds.keys() - settings), sorted(settings.keys() - kinds)
        if missing or unknown:
            raise SboraError(f"recipe lacks {missing} and has the unknown keys {unknown}", f"known: {', '.join(kinds)}")
        return cls(**{key: _coerce(key, value) for key, value in settings.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the inverse of `from_dict`."""
        return asdict(self) | {key: list(getattr(self, key)) for key in ("preview_prompts", "prior_prompts")}


_RECIPES = files("sbora_diffusion") / "recipes"


def _read_recipe(name: str) -> dict[str, Any]:
    """A recipe; `like` names another one whose settings hold where this one is silent."""
    settings = tomllib.loads((_RECIPES / f"{name}.toml").read_text())
    like = settings.pop("like", None)
    return (_read_recipe(like) if like else {}) | settings


def _kind(key: str) -> Any:
    kinds = {field.name: field.type for field in fields(TrainConfig)}
    if key not in kinds:
        raise SboraError(f"got unknown setting {key!r}", f"choose from {', '.join(kinds)}")
    return kinds[key]


def _parse(key: str, text: str) -> Any:
    """A setting's text as its field's type; lists are separated by semicolons."""
    kind = _kind(key)
    if isinstance(kind, types.GenericAlias):
        return [part.strip() for part in text.split(";") if part.strip()]
    try:
        return kind(text)
    except ValueError:
        raise SboraError(f"got {key}={text}, expected {kind.__name__}") from None


def _coerce(key: str, value: Any) -> Any:
    kind = _kind(key)
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, get_args(kind)[0]) for item in value):
            raise SboraError(f"got {key}={value!r}, expected a list of texts")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise SboraError(f"got {key}={value!r}, expected {kind.__name__}")
    return value
