"""A language model, frozen, with or without nf4, and the adapter that a method puts into it."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from sbora_diffusion.adapters.basis import Interval, Side, canonical
from sbora_diffusion.adapters.layer import attach, keep_linear4bit_unpacked
from sbora_diffusion.llm.config import METHODS, LlmConfig
from sbora_diffusion.methods.registry import find_method, method_side
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.hub import cache_if_offline, why

COMPONENT = "model"  # what the concept file calls a language model
QUANTISATIONS = ("none", "nf4")

_LORA = re.compile(r"\blora_[AB]\.")  # PEFT's own linear layers
_FINGERPRINT = "sbora_fingerprint"  # the attribute of a base model
_SAMPLED = 1024  # entries of each linear weight that enter the fingerprint


def load_base(base: str, dtype: torch.dtype | str = torch.float32, quantize: str = "none") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder (also one with a single GGUF file) or the hub.

    The files are read, and quantised, in their own type, and cast afterwards: the fingerprint is the same in each.

    Args:
        dtype: of the weights; "auto" is that of the files.

    Returns:
        The frozen model, in evaluation mode, on a GPU where one is; the tokenizer, padding on the left.

    Raises:
        SboraError: a missing or gated model, an unknown quantisation, no bitsandbytes.
    """
    options = _source(base) | _quantisation(quantize, dtype)
    with cache_if_offline(), _told(base, " (its tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(base, **_source(base))
    with cache_if_offline(), _told(base):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options)
    setattr(model, _FINGERPRINT, _digest(model))
    if isinstance(dtype, torch.dtype):
        _cast(model, dtype)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if quantize == "none" and torch.cuda.is_available():
        model = model.to(torch.device("cuda", gpu_of_process()))
    if "gguf_file" in options:
        _forget_gguf(model)
    keep_linear4bit_unpacked(model)
    return model.requires_grad_(False).eval(), tokenizer


def meta_base(base: str) -> Any:
    """The model of a configuration without its weights, on the meta device."""
    with cache_if_offline(), _told(base, " (its configuration)"):
        config = AutoConfig.from_pretrained(base, **_source(base))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def check_method(method: str) -> None:
    """Raise SboraError if language models cannot be trained by it."""
    if method not in METHODS:
        raise SboraError(f"got unknown method {method!r}, choose from {', '.join(METHODS)}")


def inject(model: Any, method: str, config: LlmConfig, interval: Interval | None) -> Any:
    """A PEFT model with a fresh adapter named "default" that changes nothing yet.

    Args:
        interval: of an SBoRA adapter; None for the others.
    """
    check_method(method)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        **find_method(method).peft_options,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    try:
        peft_model = get_peft_model(model, lora)
    except ValueError as error:
        raise SboraError(f"the targets {', '.join(config.targets)} do not fit the model ({error})") from None
    if interval is not None:
        attach(peft_model, "default", method_side(method), interval, config.basis_seed)
    return peft_model


def target_widths(model: nn.Module, targets: Sequence[str], side: Side) -> dict[str, int]:
    """Columns (fa) or rows (fb) of the linear layers of these names, by "model.<layer>".

    Raises:
        SboraError: there is none.
    """
    widths = {
        f"{COMPONENT}.{name}": module.in_features if side == "fa" else module.out_features
        for name, module in linear_layers(model).items()
        if name.endswith(tuple(f".{target}" for target in targets))
    }
    if not widths:
        raise SboraError(
            f"the targets {', '.join(targets)} do not fit the model: it has no linear layer of such a name"
        )
    return widths


def count_parameters(base: str, method: str, config: LlmConfig) -> tuple[int, int]:
    """How many parameters a method would train and the base model has, from its configuration alone."""
    model = meta_base(base)
    total = sum(parameter.numel() for parameter in model.parameters())
    check_method(method)
    interval = Interval(0, config.rank) if find_method(method).owns_interval else None
    with torch.device("meta"):
        adapted = inject(model, method, config, interval)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad), total


def fingerprint(model: nn.Module) -> str:
    """What `load_base` found in the files of a model, whatever was cast, dequantised or put into it since."""
    return getattr(model, _FINGERPRINT)


def _digest(model: nn.Module) -> str:
    """16 hexadecimal digits of all linear layers' names, shapes and sampled entries, rounded to float16.

    Layers that are quantised count with their packed bytes: another quantisation is another base.
    """
    digest = hashlib.sha256()
    for name, module in sorted(linear_layers(model).items()):
        entries = module.weight.detach().flatten()
        sample = entries[:: max(1, len(entries) // _SAMPLED)].cpu()
        sample = sample.half() if sample.is_floating_point() else sample
        digest.update(f"{name} {module.out_features} {module.in_features}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The base model's linear layers by canonical name, with or without adapters around them."""
    return {
        canonical(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _LORA.search(name)
    }


def gpu_of_process() -> int:
    """The GPU that belongs to this process of torchrun's; the first one without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _cast(model: Any, dtype: torch.dtype) -> None:
    """As if the weights had been read in this type: buffers, and what is always computed in float32, stay."""
    kept = () if dtype == torch.float32 else model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.dtype = dtype  # what it is dequantised to
        elif not any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _forget_gguf(model: Any) -> None:
    """The weights of a GGUF file are ordinary ones from here on: transformers refuses to save them otherwise."""
    model.hf_quantizer = None
    del model.config.quantization_config


@contextmanager
def _told(base: str, part: str = "") -> Iterator[None]:
    """Whatever transformers and safetensors raise at what cannot be loaded, but a lack of memory, in a line."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        gated = "gated" in str(error).lower()
        hint = "Accept its licence on its page, then run: hf auth login" if gated else "Give a folder or a hub id."
        raise SboraError(f"cannot load {base}{part}: {why(error, base).removesuffix(' from one of: ')}", hint) from None


def _source(base: str) -> dict[str, Any]:
    """Which file of a folder is the model, where it is a single GGUF file."""
    path = Path(base)
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if path.is_file() or (path.is_dir() and not ggufs and not (path / "config.json").is_file()):
        raise SboraError(f"{base} is no folder of a language model", "it needs config.json, weights and a tokenizer")
    return {"gguf_file": ggufs[0].name} if len(ggufs) == 1 else {}


def _quantisation(quantize: str, dtype: torch.dtype | str) -> dict[str, Any]:
    if quantize == "none":
        return {}
    if quantize != "nf4":
        raise SboraError(f"got quantisation {quantize!r}, choose from {', '.join(QUANTISATIONS)}")
    try:
        import bitsandbytes  # noqa: F401  # transformers says less clearly that it is missing
    except ImportError:
        raise SboraError("nf4 needs bitsandbytes", 'pip install "sbora-diffusion[llm]"') from None
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else dtype,
    )
    return {"quantization_config": nf4, "device_map": {"": gpu_of_process()} if torch.cuda.is_available() else "cpu"}
