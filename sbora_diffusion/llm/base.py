"""Load a frozen language model, with or without nf4, and put a method's adapter into it."""

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
from sbora_diffusion.llm.config import LlmConfig, side_of
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.hub import cache_if_offline, check_no_pickles, only_safetensors, pickle_hint, why

COMPONENT = "model"  # a language model's name in concept files
QUANTISATIONS = ("none", "nf4")

_LORA = re.compile(r"\blora_[AB]\.")  # PEFT's own linear layers
_FINGERPRINT = "sbora_fingerprint"  # attribute of a loaded base model
_SAMPLED = 1024  # entries of each linear weight in the fingerprint


def load_base(base: str, dtype: torch.dtype | str = torch.float32, quantize: str = "none") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a folder (also one with a single GGUF file) or the hub.

    Files are read, and quantised, in their own type and cast afterwards, so that every type has the same fingerprint.

    Args:
        dtype: of the weights; "auto" keeps that of the files.

    Returns:
        The frozen model, in evaluation mode, on a GPU if there is one; the tokenizer, with padding on the left.

    Raises:
        SboraError: a missing or gated model, an unknown quantisation, no bitsandbytes.
    """
    options = _source(base) | _quantisation(quantize, dtype)
    if "gguf_file" not in options:
        check_no_pickles(Path(base))
        options["use_safetensors"] = only_safetensors()
    with cache_if_offline(), _loading_errors(base, " (its tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(base, **_source(base))
    with cache_if_offline(), _loading_errors(base):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", **options)
    keep_linear4bit_unpacked(model)
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
    return model.requires_grad_(False).eval(), tokenizer


def meta_base(base: str) -> Any:
    """Build the model of a configuration on the meta device, without weights."""
    with cache_if_offline(), _loading_errors(base, " (its configuration)"):
        config = AutoConfig.from_pretrained(base, **_source(base))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def inject(model: Any, method: str, config: LlmConfig, interval: Interval | None) -> Any:
    """Return a PEFT model with a fresh adapter named "default" that changes nothing yet.

    Args:
        interval: of an SBoRA adapter; None for other methods.
    """
    side, targets = side_of(method), config.method.targets
    lora = LoraConfig(
        r=config.method.rank,
        lora_alpha=config.method.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        lora_dropout=config.method.dropout,
        target_modules=list(targets),
        use_dora=method == "dora",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    try:
        peft_model = get_peft_model(model, lora)
    except ValueError as error:
        raise SboraError(f"the targets {', '.join(targets)} do not fit the model ({error})") from None
    if side and interval:
        attach(peft_model, "default", side, interval, config.method.basis_seed)
    return peft_model


def target_widths(model: nn.Module, targets: Sequence[str], side: Side) -> dict[str, int]:
    """Return the number of columns (fa) or rows (fb) of the target layers, by "model.<layer>".

    Raises:
        SboraError: no linear layer has such a name.
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
    """Count the parameters that a method trains and those of the base model, from its configuration alone."""
    model = meta_base(base)
    total = sum(parameter.numel() for parameter in model.parameters())
    interval = Interval(0, config.method.rank) if side_of(method) else None
    with torch.device("meta"):
        adapted = inject(model, method, config, interval)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad), total


def fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of the files that a model was loaded from, whatever was done to the model since."""
    return getattr(model, _FINGERPRINT)


def _digest(model: nn.Module) -> str:
    """Return 16 hexadecimal digits of all linear layers' names, shapes and sampled entries, rounded to float16.

    Quantised layers enter with their packed bytes: another quantisation is another base.
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
    """Return the base model's linear layers by canonical name, with or without adapters around them."""
    return {
        canonical(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _LORA.search(name)
    }


def gpu_of_process() -> int:
    """Return the index of this process's GPU: torchrun's local rank, or 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights as if they had been read in this type: buffers and modules kept in float32 stay as they are."""
    kept = () if dtype == torch.float32 else model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.dtype = dtype  # of the dequantised weights
        elif not any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _forget_gguf(model: Any) -> None:
    """Remove the traces of the dequantised GGUF file: with them transformers refuses to train or save the model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


@contextmanager
def _loading_errors(base: str, part: str = "") -> Iterator[None]:
    """Turn what transformers and safetensors raise into a one-line error, except for a lack of memory."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        gated = "gated" in str(error).lower()
        hint = pickle_hint(error) or "Give a folder or a hub id."
        if gated:
            hint = "Accept its licence on its page, then run: hf auth login"
        raise SboraError(f"cannot load {base}{part}: {why(error, base).removesuffix(' from one of: ')}", hint) from None


def _source(base: str) -> dict[str, Any]:
    """Return the option that names the model's file if a folder holds a single GGUF file."""
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
        import bitsandbytes  # noqa: F401  # transformers' own error is less clear
    except ImportError:
        raise SboraError("nf4 needs bitsandbytes", 'pip install "sbora-diffusion[llm]"') from None
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else dtype,
    )
    return {"quantization_config": nf4, "device_map": {"": gpu_of_process()} if torch.cuda.is_available() else "cpu"}
