"""The settings of a training in their groups, and the recipe that a base model and a method start from."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from sbora_diffusion.recipes.schema import (
    NATURAL,
    POSITIVE,
    SHARE,
    Config,
    Range,
    flatten,
    parse_overrides,
    setting,
)
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import CURRENT, with_current_names

DECAY = Range(low=0, high=1, words="a decay from 0 to below 1, such as 0.99")
SUM_SAFE = "sum-safe"  # for concepts that will only ever be summed
FORMER_NAME = "loud"  # of the default, from the time when sum-safe was the default
CROP = Range(low=0, high=1, low_is_allowed=False, high_is_allowed=True, words="a number greater than 0 and up to 1")
SEED = Range(low=0, high=2**62, words=f"a number from 0 to below {2**62}")  # sums with it must still be a seed


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is added to the base model and trained."""

    name: str = setting("such as sbora-fa, lora: docs/methods.md", key="method")
    rank: int = setting("columns or rows of each adapted layer", POSITIVE)
    blocks: tuple[str, ...] = setting("blocks of the denoiser that are adapted, by prefix; empty: all")
    token_vectors: int = setting("embeddings of the concept's token", POSITIVE)
    layerwise_tokens: bool = setting("embeddings of its own for each cross-attention layer (P+)")
    basis_seed: int = setting("seed of the layers' permutations", NATURAL)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images and captions become batches."""

    batch_size: int = setting("images a step", POSITIVE)
    crops: int = setting("encoded crops of each image", POSITIVE)
    smallest_crop: float = setting("the smallest crop's side, as a fraction of the image's", CROP)
    flip: float = setting("probability that a crop is mirrored, unless its caption names left or right", SHARE)
    buckets: bool = setting("keep the images' aspect ratios, in batches of one shape")
    caption_dropout: float = setting("probability of the empty caption, for classifier-free guidance", SHARE)
    shuffle_tags: bool = setting("shuffle what stands between a caption's commas, except the first tag")
    validation_images: int = setting("images held out for the validation loss, the last ones", NATURAL)
    class_images: int = setting("generated images of the class for prior preservation (DreamBooth)", NATURAL)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How the base model computes."""

    precision: Literal["fp32", "bf16", "fp16", "nf4"] = setting("of weights and arithmetic; adapters stay in fp32")
    gradient_checkpointing: bool = setting("less memory, more time")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the parameters are updated."""

    steps: int = setting("optimiser steps", POSITIVE)
    accumulation: int = setting("batches to one optimiser step", POSITIVE)
    optimizer: Literal["adamw", "adamw-8bit", "prodigy", "schedule-free"] = setting("the algorithm")
    learning_rate: float = setting("of the denoiser's adapter", POSITIVE)
    text_encoder_learning_rate: float = setting("of the text encoders' adapters", NATURAL)
    token_learning_rate: float = setting("of the token's embeddings", NATURAL)
    scheduler: Literal["linear", "cosine", "constant"] = setting("of the learning rates after the warm-up")
    warmup_steps: int = setting("steps over which the learning rates rise", NATURAL)
    final_learning_rate: float = setting("the learning rates' last value, as a fraction of the first", SHARE)
    weight_decay: float = setting("of the optimiser", NATURAL)
    max_grad_norm: float = setting("gradients are clipped to this norm", POSITIVE)
    ema: float = setting("decay of the averaged parameters that become the result; 0: none", DECAY)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the loss is made of."""

    min_snr_gamma: float = setting("weights of the timesteps (Hang et al. 2023); 0: all alike", NATURAL)
    noise_offset: float = setting("standard deviation of a shift of each channel's noise; 0: none", NATURAL)
    masked_loss: bool = setting("only what the images' masks show counts")
    attention_weight: float = setting("of keeping the token's attention inside the masks (Mix-of-Show)", NATURAL)
    class_weight: float = setting("of the class images' loss", NATURAL)
    prior_batch: int = setting("samples a step that preserve the base model's own predictions", NATURAL)
    prior_weight: float = setting("of their loss", NATURAL)
    prior_prompts: tuple[str, ...] = setting("prompts whose predictions are preserved, too; separated by semicolons")
    output_penalty: float = setting("of the adapter's output on the prior prompts' inputs", NATURAL)
    erasure_weight: float = setting("the same on each step's own prior samples (BlockLoRA)", NATURAL)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is reported and written while training."""

    preview_every: int = setting("steps between preview images; 0: none", NATURAL)
    save_every: int = setting("steps between checkpoints", POSITIVE)
    eval_every: int = setting("steps between scores of the preview prompts' images; 0: none", NATURAL)
    eval_encoder: str = setting("the judge of these scores: emoji-clip, a CLIP's hub id or folder")
    validation_every: int = setting("steps between validation losses", NATURAL)
    keep: Literal["last", "best"] = setting("the result: the last step, or the best by score or validation loss")
    sampling_steps: int = setting("denoising steps of previews", POSITIVE)
    guidance: float = setting("classifier-free guidance of previews", NATURAL)
    preview_prompts: tuple[str, ...] = setting("with {token} for the concept's; separated by semicolons")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Everything that decides a training except the images, the base model and the interval."""

    seed: int = setting("of all random numbers", SEED)
    method: MethodConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    loss: LossConfig
    output: OutputConfig

    def check(self) -> None:
        """Raise SboraError for the first setting that is not allowed, or does not fit another one."""
        super().check()
        _check_together(self)

    @classmethod
    def from_recipe(cls, base: str, method: str, overrides: Mapping[str, str]) -> "TrainConfig":
        """Read the recipe of a base and method, or the default one adjusted to the base, and apply overrides.

        Args:
            base: "emoji64" or the name of a family.
            overrides: "key" -> "value"; "recipe" -> another recipe of this base and method, such as "sum-safe".

        Raises:
            SboraError: an unknown recipe or setting, or a value that is not allowed.
        """
        named, known = overrides.get("recipe", ""), other_recipes(base, method)
        if named == FORMER_NAME and SUM_SAFE in known:
            named = ""
        if named and named not in known:
            there = ", ".join(known) or "no other recipe than its default"
            raise SboraError(f"got recipe={named}; {method} on {base} has {there}")
        usual = _usual(base, method)
        settings = _read_recipe(f"{usual}-{named}" if named else usual)
        if usual != f"{base}-{method}" and _is_there(base):
            settings |= _read_recipe(base)
        given = parse_overrides(cls, {k: text for k, text in overrides.items() if k != "recipe"}, CURRENT)
        return cls.from_dict(settings | {"method": method} | given)

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> "TrainConfig":
        """Build a config from exactly its keys; older names are understood."""
        return super().from_dict(with_current_names(flat))


_RECIPES = files("sbora_diffusion") / "recipes"


def other_recipes(base: str, method: str) -> list[str]:
    """List the names for `recipe`, besides the default one."""
    beginning = f"{_usual(base, method)}-"
    there = [entry.name.removesuffix(".toml") for entry in _RECIPES.iterdir()]
    return sorted(name.removeprefix(beginning) for name in there if name.startswith(beginning))


def _usual(base: str, method: str) -> str:
    """Return the name of the default recipe of a base and method, or of any base where it has none of its own."""
    return f"{base}-{method}" if _is_there(f"{base}-{method}") else f"default-{method}"


def _is_there(name: str) -> bool:
    return (_RECIPES / f"{name}.toml").is_file()


def _read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe; `like` names one or several that it starts from, the last one's settings first."""
    settings = tomllib.loads((_RECIPES / f"{name}.toml").read_text())
    like, inherited = settings.pop("like", []), {}
    for other in [like] if isinstance(like, str) else like:
        inherited |= _read_recipe(other)
    return inherited | flatten(TrainConfig, settings)


def _check_together(config: TrainConfig) -> None:
    data, loss, output, prompts = config.data, config.loss, config.output, config.output.preview_prompts
    if not prompts or not all("{token}" in prompt for prompt in prompts):
        raise SboraError(f"got preview_prompts={list(prompts)}, expected texts that contain {{token}}")
    if loss.output_penalty and not loss.prior_prompts:
        raise SboraError("output_penalty needs prior prompts, of which there are none", "--set output_penalty=0")
    if loss.erasure_weight and not loss.prior_batch:
        raise SboraError("erasure_weight needs prior samples", "--set prior_batch=4")
    if loss.erasure_weight and data.buckets:
        raise SboraError("erasure_weight needs images of one shape, buckets have several", "set one of them to 0")
    if data.validation_images and not output.validation_every:
        raise SboraError(
            f"got validation_images={data.validation_images} with validation_every=0: they would never be used",
            "--set validation_every=50",
        )
    if output.keep == "best" and not (output.eval_every or data.validation_images):
        raise SboraError(
            "got keep=best with eval_every=0 and validation_images=0, expected last, or best with scores",
            "such as --set keep=best --set eval_every=50",
        )
    if output.keep == "best" and output.eval_every and data.validation_images:
        raise SboraError("got keep=best with both eval_every and validation_images", "set only one of them")
    if config.optim.ema and config.optim.optimizer == "schedule-free":
        raise SboraError("schedule-free averages the weights itself", "--set ema=0")
