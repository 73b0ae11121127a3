"""The settings of a training: a readable recipe per base model and method, and what the user sets over it."""

import tomllib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import Any, get_args, get_origin

from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.training.config_checks import check
from sbora_diffusion.utils.errors import SboraError, guess
from sbora_diffusion.utils.text import in_words


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training besides the pictures, the base model and the interval."""

    method: str
    rank: int  # columns or rows of each adapted layer
    blocks: tuple[str, ...]  # of the denoiser, by the beginnings of their names, that are adapted; none: all
    steps: int
    batch_size: int  # pictures a step
    learning_rate: float  # of the U-Net's adapter
    text_encoder_learning_rate: float
    token_learning_rate: float
    token_vectors: int  # embeddings of the concept's token
    layerwise_tokens: int  # 1: its own ones for each cross-attention layer (P+)
    optimizer: str  # adamw, adamw-8bit, prodigy, schedule-free
    weight_decay: float
    scheduler: str  # of the learning rates after the warm-up: linear or cosine (down to final_rate), or constant
    warmup_steps: int
    final_rate: float  # the learning rates' last value, as a fraction of the first
    max_grad_norm: float
    accumulation: int  # batches to one optimiser step
    precision: str  # of the arithmetic: fp32, bf16, fp16; what is trained is always kept in fp32
    gradient_checkpointing: int  # 1: less memory, more time
    ema: float  # decay of the averaged weights that become the result; 0 for none
    min_snr_gamma: float  # Hang et al. 2023; 0 for none
    noise_offset: float  # standard deviation of what is added to all of a channel's noise; 0 for none
    masked_loss: int  # 1: only what the pictures' masks show is learned
    attention_weight: float  # of keeping the token's attention inside the masks (Mix-of-Show)
    caption_dropout: float  # probability of the empty caption, for classifier-free guidance
    shuffle_tags: int  # 1: what stands between a caption's commas changes places at every step, but for the first
    crops: int  # encoded variants of each picture
    smallest_crop: float  # the smallest variant's side, as a fraction of the picture's
    flip: float  # probability that a variant is mirrored, unless its caption names left or right
    buckets: int  # 1: pictures keep their proportions, in batches of one shape
    validation_pictures: int  # held out, the last ones; their loss is measured
    validation_every: int  # steps
    class_pictures: int  # of the base model's own, which keep the class what it is (DreamBooth); 0 for none
    class_weight: float
    prior_batch: int  # samples a step that hold the base model's own answers in place
    prior_weight: float
    prior_prompts: tuple[str, ...]  # what else the base model's answers are held for
    quiet_weight: float  # of the adapter's loudness on the prior prompts' inputs
    erasure_weight: float  # the same on each step's own prior samples (BlockLoRA)
    preview_every: int  # steps; 0 for none
    save_every: int  # steps between checkpoints
    eval_every: int  # steps between scores of the preview prompts' pictures; 0 for none
    eval_encoder: str  # who gives them: see evaluation.encoders.load_encoder
    keep: str  # "last": the result is the last step's; "best": that of the best scored, or validated, step
    sampling_steps: int
    guidance: float
    preview_prompts: tuple[str, ...]  # {token} stands for the concept's
    seed: int
    basis_seed: int  # of the layers' permutations; concepts of different basis seeds may share columns

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def from_recipe(cls, base: str, method: str, overrides: Mapping[str, str]) -> "TrainConfig":
        """The recipe of a base and method, or the default one as the base needs it, with `overrides` over it.

        Args:
            base: "emoji64" or the name of a family, as `loading.recipe_base` knows it of every base model.
            overrides: "key" -> "value"; "recipe" -> another one of this base and method, such as "loud".

        Raises:
            SboraError: an unknown method, recipe or setting, or a value that cannot be.
        """
        find_method(method)
        usual, named = f"{base}-{method}", overrides.get("recipe", "")
        if named and named not in (known := other_recipes(base, method)):
            there = ", ".join(known) or "no other recipe than its usual one"
            raise SboraError(f"got recipe={named}; {method} on {base} has {there}")
        if named or _is_there(usual):
            settings = _read_recipe(f"{usual}-{named}" if named else usual)
        else:
            settings = _read_recipe(f"default-{method}") | (_read_recipe(base) if _is_there(base) else {})
        given = {key: _parse(key, text) for key, text in overrides.items() if key != "recipe"}
        return cls.from_dict(settings | {"method": method} | given)

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
        return asdict(self) | {key: list(value) for key, value in vars(self).items() if isinstance(value, tuple)}


_RECIPES = files("sbora_diffusion") / "recipes"


def other_recipes(base: str, method: str) -> list[str]:
    """Names for `recipe`, besides the usual one."""
    beginning = f"{base}-{method}-"
    there = [entry.name.removesuffix(".toml") for entry in _RECIPES.iterdir()]
    return sorted(name.removeprefix(beginning) for name in there if name.startswith(beginning))


def _is_there(name: str) -> bool:
    return (_RECIPES / f"{name}.toml").is_file()


def _read_recipe(name: str) -> dict[str, Any]:
    """A recipe; `like` names one or several, whose settings hold where this one is silent, the last one's first."""
    settings = tomllib.loads((_RECIPES / f"{name}.toml").read_text())
    like, inherited = settings.pop("like", []), {}
    for other in [like] if isinstance(like, str) else like:
        inherited |= _read_recipe(other)
    return inherited | settings


def _kind(key: str) -> Any:
    kinds = {field.name: field.type for field in fields(TrainConfig)}
    if key not in kinds:
        raise SboraError(f"got unknown setting {key!r}", f"{guess(key, kinds)}choose from {', '.join(kinds)}")
    return kinds[key]


def _parse(key: str, text: str) -> Any:
    """A setting's text as its field's type; lists are separated by semicolons."""
    kind = _kind(key)
    if isinstance(kind, types.GenericAlias):
        return [part.strip() for part in text.split(";") if part.strip()]
    try:
        return kind(text)
    except ValueError:
        raise SboraError(f"got {key}={text}, expected {in_words(kind)}") from None


def _coerce(key: str, value: Any) -> Any:
    kind = _kind(key)
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, get_args(kind)[0]) for item in value):
            raise SboraError(f"got {key}={value!r}, expected a list of texts")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise SboraError(f"got {key}={value!r}, expected {in_words(kind)}")
    return value
