"""The memory that a training needs, computed from shapes alone, and the settings that reduce it."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sbora_diffusion.adapters.linear_function import num_held
from sbora_diffusion.methods.live import blocks_before, only_passed
from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import TextConditioning
from sbora_diffusion.models.quantization import BYTES, packable
from sbora_diffusion.recipes.config import TrainConfig

# gradient checkpointing keeps only the inputs of these, and computes the rest again
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock",
          "FluxSingleTransformerBlock")  # fmt: skip
LEAN = {"batch_size": 1, "prior_batch": 0, "class_images": 0, "gradient_checkpointing": True}
LEANER = {"fp32": "bf16", "bf16": "nf4", "fp16": "nf4"}
GIGABYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes in fp32 that one sample's forward pass keeps for the backward pass."""

    everything: int  # in the denoiser
    checkpointed: int  # the same with gradient checkpointing
    text: int = 0  # in the text encoders that learn


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes that a training needs, without the libraries' own memory and buffers between layers."""

    weights: int
    trained: int  # parameters, gradients, and the optimiser's two moments
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations

    def __str__(self) -> str:
        total, weights, kept, trained = map(_rounded, (self.total, self.weights, self.activations, self.trained))
        return f"about {total} ({weights} of weights, {kept} of activations, {trained} of what is trained)"


def _rounded(number: int) -> str:
    return f"{number / GIGABYTE:.1f} GB" if number >= GIGABYTE else f"{number / 2**20:.0f} MB"


def estimate(base: Base, config: TrainConfig, kept: Activations) -> Estimate:
    """Estimate a training's memory; `kept` are the base model's `activations`."""
    samples = config.data.batch_size * (2 if config.data.class_images else 1) + config.loss.prior_batch
    each = kept.text + (kept.checkpointed if config.model.gradient_checkpointing else kept.everything)
    half = config.model.precision != "fp32"  # nf4 computes in bf16
    return Estimate(
        weights=_weights(base, config.model.precision),
        trained=find_method(config.method.name).num_weights(base, config) * 4 * 4,
        activations=samples * each // (2 if half else 1),
    )


def _weights(base: Base, precision: str) -> int:
    """Return the bytes of this process's weights; the VAE's stay in fp32."""
    total, each = 0.0, 4 if precision == "fp32" else 2
    for module in base.family.modules(base.pipeline):
        held = sum(map(num_held, module.parameters()))
        total += held * (4 if module is base.pipeline.vae else each)
        if precision == "nf4" and module in base.family.frozen(base.pipeline):
            total -= sum(num_held(layer.weight) for layer in packable(module).values()) * (each - BYTES)
    return int(total)


def advice(base: Base, config: TrainConfig, kept: Activations) -> str:
    """Return the settings that would save memory, most first, with what each saves by itself, in one line."""
    before, savings = estimate(base, config, kept).total, []
    leaner = LEANER.get(config.model.precision, config.model.precision)
    if leaner == "nf4" and find_method(config.method.name).reads_weights:
        leaner = config.model.precision
    for key, value in (LEAN | {"precision": leaner}).items():
        if config[key] != value:
            saved = before - estimate(base, config.with_settings(**{key: value}), kept).total
            if saved > before // 50:
                savings.append((saved, f"--set {key}={str(value).lower()} (saves {saved / GIGABYTE:.1f} GB)"))
    most_first = [text for _, text in sorted(savings, reverse=True)]
    return ", ".join(most_first) or "no setting saves much: take a smaller base model"


def available(device: torch.device) -> int:
    """Return the bytes of the GPU, or of the machine's memory that is free or this process's own."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def activations(base: Base, config: TrainConfig) -> Activations:
    """Count what one sample's forward pass keeps: the denoiser's on the meta device, the text encoders' of no words."""
    text, text_bytes = _encode_no_words(base)
    pipeline = copy.copy(base.pipeline)
    denoiser: Any = base.denoiser
    with torch.device("meta"):
        model = type(denoiser).from_config(denoiser.config).requires_grad_(False)
    setattr(pipeline, base.family.denoiser, model)
    size, channels = base.family.latent_size(pipeline), base.pipeline.vae.config.latent_channels
    noisy = torch.empty(1, channels, size, size, device="meta", requires_grad=True)
    frozen = blocks_before(base, config.method.blocks)
    with _counted(model) as count, _FusedAttention(), only_passed(model, frozen):
        for last in frozen[-1:]:  # gradients begin where an adapter does
            model.get_submodule(last).register_forward_hook(_require_gradients)
        base.family.predict(pipeline, noisy, torch.full((1,), 500.0, device="meta"), text)
    text_bytes *= 1 if base.precision == "fp32" else 2  # counted in half precision
    return Activations(everything=count.total, checkpointed=count.checkpointed, text=text_bytes)


def _encode_no_words(base: Base) -> tuple[TextConditioning, int]:
    """Return the conditioning on the meta device, and the bytes that learning a token keeps in the text encoders."""
    encoders: list[Any] = [base.component(spec.component) for spec in base.learners]
    with _counted(nn.ModuleList(encoders)) as count, ExitStack() as stack:
        for encoder in encoders:
            stack.callback(encoder.get_input_embeddings().register_forward_hook(_require_gradients).remove)
        text = base.encode_text(base.tokenize([""]))
    states, pooled = (
        None if tensor is None else tensor.detach().to("meta", torch.float32) for tensor in (text.states, text.pooled)
    )
    assert states is not None
    return TextConditioning(states, pooled), count.total


def _require_gradients(_: nn.Module, __: Any, output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).requires_grad_()


class _Count:
    """Bytes that autograd saves: in total, and with gradient checkpointing, which holds one block at a time."""

    def __init__(self) -> None:
        self.total, self.inputs, self.before_block = 0, 0, 0
        self.blocks = [0]  # bytes saved in each block

    @property
    def checkpointed(self) -> int:
        return self.total - sum(self.blocks) + self.inputs + max(self.blocks)

    def enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.requires_grad]
        self.inputs += sum(tensor.nbytes for tensor in inputs)
        self.before_block = self.total

    def leave_block(self, *_: object) -> None:
        self.blocks.append(self.total - self.before_block)


@contextmanager
def _counted(model: nn.Module) -> Iterator[_Count]:
    """Count what forward passes of a model save for the backward pass, each storage once, weights excluded."""
    count = _Count()
    seen = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}  # held: numbers stay unique

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            count.total += storage.nbytes()
        return tensor

    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    hooks = [block.register_forward_pre_hook(count.enter_block, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(count.leave_block) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield count
    finally:
        for hook in hooks:
            hook.remove()


class _FusedAttention(TorchFunctionMode):
    """Save attention's inputs and output, as fused kernels do, and no matrix of weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result
