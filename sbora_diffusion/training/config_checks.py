"""What a training's settings may be: each by itself, then those that must fit each other."""

from typing import TYPE_CHECKING

from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.training.config import TrainConfig

_POSITIVE = ("rank", "token_vectors", "steps", "batch_size", "accumulation", "crops", "save_every", "sampling_steps")
_POSITIVE += ("learning_rate", "max_grad_norm", "smallest_crop")
_NATURAL = ("text_encoder_learning_rate", "token_learning_rate", "weight_decay", "warmup_steps", "min_snr_gamma")
_NATURAL += ("noise_offset", "attention_weight", "prior_batch", "prior_weight", "quiet_weight", "erasure_weight")
_NATURAL += ("validation_pictures", "validation_every", "class_pictures", "class_weight", "preview_every", "eval_every")
_NATURAL += ("guidance", "seed", "basis_seed")
_SHARES = ("caption_dropout", "final_rate", "smallest_crop", "flip")
_SWITCHES = ("layerwise_tokens", "gradient_checkpointing", "masked_loss", "shuffle_tags", "buckets")
MOST_SEED = 2**62  # what is added to it must fit a generator's seed, too
_CHOICES = {
    "optimizer": ("adamw", "adamw-8bit", "prodigy", "schedule-free"),
    "scheduler": ("linear", "cosine", "constant"),
    "precision": ("fp32", "bf16", "fp16", "nf4"),
    "keep": ("last", "best"),
}


def check(config: "TrainConfig") -> None:
    """SboraError for the first setting that cannot be."""
    for key in _POSITIVE + _NATURAL:
        value, is_positive = getattr(config, key), key in _POSITIVE
        if not 0 <= value < float("inf") or (is_positive and value == 0):
            raise SboraError(f"got {key}={value}, expected a number {'greater than 0' if is_positive else 'from 0 on'}")
    for key in _SHARES:
        if not 0 <= getattr(config, key) <= 1:
            raise SboraError(f"got {key}={getattr(config, key)}, expected a number from 0 to 1")
    if config.seed >= MOST_SEED:
        raise SboraError(f"got seed={config.seed}, expected a number below {MOST_SEED}")
    if not 0 <= config.ema < 1:
        raise SboraError(f"got ema={config.ema}, expected a decay from 0 to below 1", "such as --set ema=0.99")
    for key in _SWITCHES:
        if getattr(config, key) not in (0, 1):
            raise SboraError(f"got {key}={getattr(config, key)}, expected 0 or 1")
    for key, allowed in _CHOICES.items():
        if getattr(config, key) not in allowed:
            raise SboraError(f"got {key}={getattr(config, key)}, choose from {', '.join(allowed)}")
    if not config.preview_prompts or not all("{token}" in prompt for prompt in config.preview_prompts):
        raise SboraError(f"got preview_prompts={list(config.preview_prompts)}, expected texts that contain {{token}}")
    _check_together(config)


def _check_together(config: "TrainConfig") -> None:
    if find_method(config.method).kind not in ("fa", "fb") and (config.quiet_weight or config.erasure_weight):
        raise SboraError(f"quiet_weight and erasure_weight are for columns and rows, {config.method} has neither")
    if find_method(config.method).kind == "none" and config.blocks:
        raise SboraError(f"blocks says which layers are adapted, {config.method} adapts none", "--set blocks=")
    if find_method(config.method).kind == "none" and not config.token_learning_rate:
        raise SboraError(f"got token_learning_rate=0: {config.method} would learn nothing", "leave it out")
    if config.quiet_weight and not config.prior_prompts:
        raise SboraError("quiet_weight is for the inputs of prior prompts, of which there are none", "set it to 0")
    if config.erasure_weight and not config.prior_batch:
        raise SboraError("erasure_weight needs prior samples", "--set prior_batch=4")
    if config.erasure_weight and config.buckets:
        raise SboraError("erasure_weight looks at pictures of one shape, buckets are of many", "set one of them to 0")
    if config.precision == "nf4" and (find_method(config.method).needs_whole_weights or config.erasure_weight):
        raise SboraError(f"{config.method} reads whole weights, nf4 has none", "--set precision=bf16")
    if config.validation_pictures and not config.validation_every:
        raise SboraError(f"got validation_pictures={config.validation_pictures} and validation_every=0: never asked")
    if config.keep == "best" and not (config.eval_every or config.validation_pictures):
        raise SboraError(
            "got keep=best with eval_every=0 and validation_pictures=0, expected last, or best with scores",
            "such as --set keep=best --set eval_every=50",
        )
    if config.keep == "best" and config.eval_every and config.validation_pictures:
        raise SboraError("got keep=best with both eval_every and validation_pictures", "which of them is to decide?")
    if config.ema and config.optimizer == "schedule-free":
        raise SboraError("schedule-free averages the weights itself", "--set ema=0")
