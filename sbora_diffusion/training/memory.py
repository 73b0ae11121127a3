"""How much memory a training will need, from shapes alone, and what to set where that is too much."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
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

# what gradient checkpointing computes again: it keeps their inputs only
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock",
          "FluxSingleTransformerBlock")  # fmt: skip
LEAN = {"batch_size": 1, "prior_batch": 0, "class_images": 0, "gradient_checkpointing": True}
LEANER = {"fp32": "bf16", "bf16": "nf4", "fp16": "nf4"}  # what takes less memory
GIGABYTE = 2**30


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes in fp32 that one sample's forward pass keeps for the backward pass."""

    everything: int  # in the denoiser
    checkpointed: int  # the same with gradient checkpointing
    text: int = 0  # in the text encoders that learn


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes that a training needs at least: what the libraries need for themselves and between layers comes on top."""

    weights: int
    trained: int  # parameters, gradients, and the optimiser's two moments
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations

    def __str__(self) -> str:
        total, weights, kept, trained = map(_told, (self.total, self.weights, self.activations, self.trained))
        return f"about {total} ({weights} of weights, {kept} of activations, {trained} of what is trained)"


def _told(number: int) -> str:
    return f"{number / GIGABYTE:.1f} GB" if number >= GIGABYTE else f"{number / 2**20:.0f} MB"


def estimate(base: Base, config: TrainConfig, kept: Activations) -> Estimate:
    """What a training needs.

    Args:
        kept: what `activations` says of the base model.
    """
    samples = config.data.batch_size * (2 if config.data.class_images else 1) + config.loss.prior_batch
    each = kept.text + (kept.checkpointed if config.model.gradient_checkpointing else kept.everything)
    half = config.model.precision != "fp32"  # nf4 computes in bf16
    return Estimate(
        weights=_weights(base, config.model.precision),
        trained=find_method(config.method.name).num_weights(base, config) * 4 * 4,
        activations=samples * each // (2 if half else 1),
    )


def _weights(base: Base, precision: str) -> int:
    """Bytes of this process's weights; the autoencoder's stay in fp32."""
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
    """Bytes of the GPU, or what is free of the machine's memory besides what this process has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def activations(base: Base, config: TrainConfig) -> Activations:
    """What a forward pass keeps, counted on a copy of the denoiser without numbers, and on one reading of no words."""
    text, of_text = _read(base)
    pipeline, model = copy.copy(base.pipeline), _without_numbers(base.denoiser)
    setattr(pipeline, base.family.denoiser, model)
    size = base.family.latent_size(pipeline)
    channels = base.pipeline.vae.config.latent_channels
    noisy = torch.empty(1, channels, size, size, device="meta", requires_grad=True)
    count, passed = _Count(model), blocks_before(base, config.method.blocks)
    t = torch.full((1,), 500.0, device="meta")
    with count.counting(), _FusedAttention(), only_passed(model, passed):
        for last in passed[-1:]:
            model.get_submodule(last).register_forward_hook(_learn_from_here)
        base.family.predict(pipeline, noisy, t, text)
    checkpointed = count.outside + count.inputs + max(count.by_block.values())
    of_text *= 1 if base.precision == "fp32" else 2  # counted in half precision
    return Activations(everything=count.total, checkpointed=checkpointed, text=of_text)


def _read(base: Base) -> tuple[TextConditioning, int]:
    """A text without numbers, and the bytes that reading it keeps where tokens are learned."""
    encoders: list[Any] = [base.component(reader.component) for reader in base.learners]
    count = _Count(nn.ModuleList(encoders))
    with ExitStack() as stack:
        for encoder in encoders:
            hook = encoder.get_input_embeddings().register_forward_hook(lambda _m, _i, read: read.requires_grad_())
            stack.callback(hook.remove)
        stack.enter_context(count.counting())
        text = base.encode_text(base.tokenize([""]))
    pooled = None if text.pooled is None else text.pooled.detach().to("meta", torch.float32)
    return TextConditioning(text.states.detach().to("meta", torch.float32), pooled), count.total


def _learn_from_here(_: nn.Module, __: Any, given: Any) -> None:
    """What the last block gives that is only passed is differentiated from there on, as an adapter does it."""
    (given[0] if isinstance(given, tuple) else given).requires_grad_()


def _without_numbers(denoiser: Any) -> nn.Module:
    with torch.device("meta"):
        return type(denoiser).from_config(denoiser.config).requires_grad_(False)


class _Count:
    """Bytes that autograd saves, by the block of the model that saves them."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs, self.outside, self.by_block = 0, 0, {0: 0}
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._seen: list[Any] = []  # storages, held so that none is freed and its number used again
        self._numbers: set[int] = set()
        self._block = 0
        self._blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]

    @property
    def total(self) -> int:
        return self.outside + sum(self.by_block.values())

    def counting(self) -> ExitStack:
        """Within it, forward passes are counted."""
        stack = ExitStack()
        for number, block in enumerate(self._blocks, 1):
            for hook in (
                block.register_forward_pre_hook(self._enter(number), with_kwargs=True),
                block.register_forward_hook(lambda *_: self._leave()),
            ):
                stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
        return stack

    def _enter(self, number: int) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._block = number
            self.by_block[number] = 0
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            self.inputs += sum(_bytes(tensor) for tensor in tensors if tensor.requires_grad)

        return enter

    def _leave(self) -> None:
        self._block = 0

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters | self._numbers:
            self._numbers.add(storage._cdata)
            self._seen.append(storage)
            if self._block:
                self.by_block[self._block] += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Attention keeps its inputs and its output, as the fused kernels do that compute it, and no matrix of weights."""

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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
