"""SBoRA on PEFT's LoRA layers: attach to injected adapters, detect in loaded ones, collect the result."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, LoraLayer, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval, Side, canonical, indices
from sbora_diffusion.adapters.file import Factor
from sbora_diffusion.adapters.peft_layer import SboraVariant, end_inplace_training, make_fast, trained_factor
from sbora_diffusion.utils.errors import SboraError

logger = logging.getLogger(__name__)

_NOT_LINEAR = (Conv1d, Conv2d, Conv3d, Embedding, MultiheadAttention, ParamWrapper)
_PEFT_HOOKS = ("lora_variant", "frozen_peft_weight_names")


@dataclass(frozen=True, eq=False)
class SboraLayer:
    """One SBoRA adapter of one live layer."""

    name: str  # canonical
    module: LoraLayer
    adapter: str
    side: Side
    index: Tensor  # (r,) int64, columns for fa, rows for fb

    @property
    def trained(self) -> nn.Parameter:
        """B (out, r) for fa, A (r, in) for fb."""
        return trained_factor(self.module, self.adapter, self.side)

    @property
    def scaling(self) -> float:
        return self.module.scaling[self.adapter]

    def delta(self) -> Tensor:
        """Return the change of the columns or rows `index` of the base weight: (out, r) for fa, (r, in) for fb."""
        return self.trained * self.scaling


def attach(model: nn.Module, adapter: str, side: Side, interval: Interval, seed: int) -> dict[str, SboraLayer]:
    """Turn a freshly injected LoRA adapter into an SBoRA adapter that changes nothing yet.

    Works in place after any injection (`get_peft_model`, `add_adapter`), also on the meta device: writes one-hot rows
    into A (FA) or one-hot columns into B (FB) and freezes them permanently, sets the other factor to zero, and gives
    the layers the fast forward.

    Returns:
        The adapter's layers by canonical name.

    Raises:
        SboraError: no layer to attach to, a rank that is not the interval's, an interval that does not fit, a layer
            that is not linear, or DoRA or another LoRA variant on the same layer.
    """
    found: dict[str, Any] = {canonical(name): module for name, module in _lora_layers(model, adapter)}
    if not found:
        raise SboraError(f"the model has no LoRA layer of an adapter named {adapter!r}")
    positions = {}
    for name, module in found.items():
        _check_attachable(name, module, adapter, interval.rank)
        positions[name] = indices(name, module.in_features if side == "fa" else module.out_features, interval, seed)
    keep_linear4bit_unpacked(model)
    layers = {name: _attach_layer(name, found[name], adapter, side, index) for name, index in positions.items()}
    _warn_of_missing_hooks(layers)
    return layers


def detect(model: nn.Module, adapter: str) -> dict[str, SboraLayer]:
    """Find the layers in which a loaded LoRA adapter has a one-hot factor, and make them SBoRA layers in place.

    A scale per one-hot row (from `add_weighted_adapter("cat")`) is folded into the other factor. Call this again after
    a hot-swap. Layers without a one-hot factor stay, or become again, plain LoRA layers.

    Returns:
        The layers found, by canonical name.
    """
    keep_linear4bit_unpacked(model)
    linear = ((name, module) for name, module in _lora_layers(model, adapter) if not isinstance(module, _NOT_LINEAR))
    found = [_detect_layer(canonical(name), module, adapter) for name, module in linear]
    layers = {layer.name: layer for layer in found if layer is not None}
    _warn_of_missing_hooks(layers)
    return layers


def collect(model: nn.Module, adapter_name: str, component: str) -> dict[str, Factor]:
    """Copy an adapter from a live model: detached float32 tensors on the CPU, by "<component>.<layer>"."""
    layers = detect(model, adapter_name)
    if not layers:
        raise SboraError(f"adapter {adapter_name!r} of the {component} has no layer with a one-hot factor")
    return {
        f"{component}.{name}": Factor(
            index=layer.index.detach().cpu().clone(),
            weight=layer.trained.detach().to("cpu", torch.float32) * layer.scaling,
        )
        for name, layer in layers.items()
    }


def _lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            yield name, module


def _check_attachable(name: str, module: LoraLayer, adapter: str, rank: int) -> None:
    if isinstance(module, _NOT_LINEAR):
        raise SboraError(
            f"layer {name} is a {type(module).__name__}, SBoRA needs linear layers",
            hint="Leave it out of target_modules.",
        )
    if not _is_free(module, adapter):
        variant = type(module.lora_variant[adapter]).__name__ if adapter in module.lora_variant else "a LoRA bias"
        raise SboraError(
            f"adapter {adapter!r} of layer {name} already has {variant}, which SBoRA cannot be combined with",
            hint="Make the LoraConfig without use_dora, lora_bias and the like.",
        )
    if module.r[adapter] != rank:
        raise SboraError(f"adapter {adapter!r} has rank {module.r[adapter]} in layer {name}, its interval has {rank}")
    _check_unmerged(name, module, adapter)


def _check_unmerged(name: str, module: LoraLayer, adapter: str) -> None:
    if adapter in module.merged_adapters:
        raise SboraError(f"adapter {adapter!r} is merged into layer {name}", hint="Unmerge it first.")


def _is_free(module: LoraLayer, adapter: str) -> bool:
    """Return whether no other LoRA variant occupies the adapter's slot."""
    variant = getattr(module, "lora_variant", {}).get(adapter)
    return (variant is None or isinstance(variant, SboraVariant)) and not module.lora_bias[adapter]


@torch.no_grad()
def _attach_layer(name: str, module: LoraLayer, adapter: str, side: Side, index: Tensor) -> SboraLayer:
    one_hot, dim = _one_hot_factor(module, adapter, side)
    one_hot.zero_().scatter_(dim, index.to(one_hot.device).unsqueeze(dim), 1.0)
    trained_factor(module, adapter, side).zero_()
    return _upgrade(name, module, adapter, side, index)


@torch.no_grad()
def _detect_layer(name: str, module: LoraLayer, adapter: str) -> SboraLayer | None:
    if not _is_free(module, adapter):
        return None
    _check_unmerged(name, module, adapter)
    for side in ("fa", "fb"):
        one_hot, dim = _one_hot_factor(module, adapter, side)
        index = _one_hot_index(one_hot, dim)
        if index is not None:
            values = one_hot.gather(dim, index.unsqueeze(dim))  # (r, 1) for fa, (1, r) for fb
            if (values != 1).any():
                trained = trained_factor(module, adapter, side)
                trained.copy_(trained.float() * values.float().t())
                one_hot.scatter_(dim, index.unsqueeze(dim), 1.0)
            return _upgrade(name, module, adapter, side, index)
    _downgrade(module, adapter)
    return None


def _one_hot_factor(module: LoraLayer, adapter: str, side: Side) -> tuple[nn.Parameter, int]:
    """Return the frozen factor and the dimension along which it is one-hot: A (r, in) and 1, or B (out, r) and 0."""
    return (trained_factor(module, adapter, "fb"), 1) if side == "fa" else (trained_factor(module, adapter, "fa"), 0)


def _one_hot_index(factor: Tensor, dim: int) -> Tensor | None:
    """Return where each row (dim 1) or column (dim 0) has its only nonzero entry, or None: all in different places."""
    if factor.is_meta:
        return None
    nonzero = factor != 0
    index = nonzero.int().argmax(dim)
    is_one_hot = bool((nonzero.sum(dim) == 1).all()) and bool(factor.isfinite().all())
    return index if is_one_hot and len(index.unique()) == len(index) else None


def _upgrade(name: str, module: LoraLayer, adapter: str, side: Side, index: Tensor) -> SboraLayer:
    """Freeze the one-hot factor, put the variant into PEFT's slot, and give the layer the fast forward."""
    one_hot, _ = _one_hot_factor(module, adapter, side)
    trained = trained_factor(module, adapter, side)
    trained.requires_grad_(trained.requires_grad or one_hot.requires_grad)
    one_hot.requires_grad_(False)
    if _missing_hooks(module):
        return SboraLayer(name, module, adapter, side, index)
    frozen = "lora_A" if side == "fa" else "lora_B"
    module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, adapter: (frozen,)}
    module.lora_variant[adapter] = SboraVariant(side, index)  # type: ignore[assignment]  # has a LoraVariant's methods
    make_fast(module)
    end_inplace_training(module, adapter)  # it refers to the columns or rows of the replaced variant
    return SboraLayer(name, module, adapter, side, index)


def _missing_hooks(module: LoraLayer) -> list[str]:
    return [hook for hook in _PEFT_HOOKS if not hasattr(module, hook)]


def _warn_of_missing_hooks(layers: dict[str, SboraLayer]) -> None:
    missing = {hook for layer in layers.values() for hook in _missing_hooks(layer.module)}
    if missing:
        logger.warning(
            "this PEFT has no %s: adapters stay dense LoRAs (slower, same output); set_adapter unfreezes the basis",
            ", ".join(sorted(missing)),
        )


def _downgrade(module: LoraLayer, adapter: str) -> None:
    """Make an adapter plain LoRA again, after a hot-swap has replaced its one-hot factor by a dense one."""
    if isinstance(getattr(module, "lora_variant", {}).get(adapter), SboraVariant):
        del module.lora_variant[adapter]
        del module.frozen_peft_weight_names[adapter]


def keep_linear4bit_unpacked(model: Any) -> None:
    """Prevent bitsandbytes from repacking the 4-bit layers of any module; call it wherever one is loaded.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation. Repacked layers give no
    gradient, and small ones fail ("N must be divisible by block_n"). Layers that are repacked already are unpacked.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # bitsandbytes unpacks a layer when it is saved
