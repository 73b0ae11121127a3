"""Write adapters into the weights of a model, or beside quantised weights, and remove them bit for bit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side, canonical
from sbora_diffusion.adapters.file import Adapter, Factor, check_factor
from sbora_diffusion.adapters.linear_function import (
    full_weight,
    gather_inputs,
    is_quantised,
    overwrite,
    without_autocast,
)
from sbora_diffusion.utils.errors import SboraError


@dataclass(frozen=True, eq=False)
class _Patch:
    """A written adapter."""

    factors: dict[str, Factor]  # each is moved to its weight's device once, and again if the model has moved
    side: Side
    strength: float


@dataclass(frozen=True, eq=False)
class _Originals:
    """The original entries of one weight in the columns (dim 1) or rows (dim 0) that are overwritten."""

    dim: int
    index: Tensor  # (c,), of one adapter in its own order, of several sorted
    values: Tensor  # (out, c) or (c, in)
    is_shared: bool  # by several adapters


class WeightPatcher:
    """Writes adapters into a model's base weights, with or without PEFT layers around them.

    The weights depend only on which adapters are written and how strongly, not on the order of the calls: touched
    entries are the original plus all contributions, summed in float32 in the order of the adapters' names. Only the
    originals of touched columns and rows are kept. While something is written, nobody else may change these weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._patches: dict[str, _Patch] = {}
        self._originals: dict[str, list[_Originals]] = {}
        self._unfinished: set[str] = set()  # layers that an interrupt has left between two states

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._patches))

    def write(self, name: str, factors: Mapping[str, Factor], side: Side, strength: float = 1.0) -> None:
        """Write an adapter; it replaces an earlier one of the same name.

        Args:
            factors: by canonical layer, as from `Adapter.component`; no index occurs twice in one.
            strength: multiplies the whole adapter; may be negative or above one.

        Raises:
            SboraError: a layer is missing, does not fit, is quantised or merged by PEFT. Nothing is changed then.
        """
        if not math.isfinite(strength):
            raise SboraError(f"got strength {strength} for {name!r}, expected a finite number")
        weights = self._weights()
        for layer, factor in factors.items():
            _check_writable(layer, factor, side, weights)
        before = self._patches[name].factors if name in self._patches else {}
        self._patches[name] = _Patch(dict(factors), side, strength)
        self._rewrite({*before, *factors}, weights)

    def restore(self, name: str) -> None:
        """Remove an adapter: the weights are as if it had never been written."""
        if name not in self._patches:
            raise SboraError(f"{name!r} is not written into the weights, only {', '.join(self.names) or 'nothing'} is")
        weights = self._weights()
        self._rewrite(self._patches.pop(name).factors, weights)

    def restore_all(self) -> None:
        """Remove all adapters: the weights are the original ones, bit for bit."""
        weights = self._weights()
        self._patches.clear()
        self._rewrite(list(self._originals), weights)

    def _weights(self) -> dict[str, Tensor]:
        """Return the base weights by canonical name, looked up at each call: PEFT may have wrapped layers meanwhile."""
        weights = {}
        for name, module in self._model.named_modules():
            if isinstance(module, BaseTunerLayer):
                if module.merged:
                    raise SboraError(f"PEFT has merged an adapter into layer {name}", hint="Unmerge it first.")
            elif isinstance(module, nn.Linear):
                weights[canonical(name)] = module.weight
        return weights

    @torch.no_grad()
    def _rewrite(self, layers: Iterable[str], weights: Mapping[str, Tensor]) -> None:
        """Restore layers, then write the current patches; originals stay while any adapter touches their layer."""
        patches = [self._patches[name] for name in self.names]
        self._unfinished.update(layers)
        for layer in sorted(self._unfinished):
            weight = weights[layer]
            for block in self._originals.get(layer, ()):
                overwrite(weight, block.dim, block.index.to(weight.device), block.values.to(weight))
            self._originals.pop(layer, None)
            of_layer = [patch for patch in patches if layer in patch.factors]
            for patch in of_layer:
                patch.factors[layer] = _on_device_of(weight, patch.factors[layer])
            if of_layer:
                blocks = self._originals[layer] = _originals(weight, of_layer, layer)
                sums = [_sum_block(block, of_layer, layer).to(weight.dtype) for block in blocks]
                for block, values in zip(blocks, sums, strict=True):
                    overwrite(weight, block.dim, block.index, values)
            self._unfinished.discard(layer)


def _on_device_of(weight: Tensor, factor: Factor) -> Factor:
    return Factor(factor.index.to(weight.device), factor.weight.to(weight.device))


def _check_writable(layer: str, factor: Factor, side: Side, weights: Mapping[str, Tensor]) -> None:
    if layer not in weights:
        raise SboraError(f"the model has no linear layer {layer}", hint="Is this adapter for another base model?")
    weight = weights[layer]
    if is_quantised(weight):
        raise SboraError(
            f"layer {layer} is quantised: writing into it would change entries that the adapter does not own",
            hint="Attach the adapter instead of writing it, or load the model without quantisation.",
        )
    check_factor(layer, factor, side, (weight.shape[0], weight.shape[1]))


def _originals(weight: Tensor, patches: Sequence[_Patch], layer: str) -> list[_Originals]:
    """Copy what adapters are about to replace in an original weight (out, in).

    Where a column and a row cross, both blocks sum the same numbers in the same order.
    """
    blocks = []
    for dim, side in ((1, "fa"), (0, "fb")):
        indices = [patch.factors[layer].index for patch in patches if patch.side == side]
        if indices:
            index = indices[0] if len(indices) == 1 else torch.cat(indices).unique()  # sorted
            blocks.append(_Originals(dim, index, weight.index_select(dim, index), len(indices) > 1))
    return blocks


def _sum_block(block: _Originals, patches: Sequence[_Patch], layer: str) -> Tensor:
    """Return the original columns or rows plus what all adapters add to them, in float32 at least."""
    total = block.values.to(torch.promote_types(block.values.dtype, torch.float32), copy=True)
    for patch in patches:
        own, delta = patch.factors[layer].index, patch.factors[layer].weight.to(total)
        delta = delta if patch.strength == 1 else delta * patch.strength
        if block.dim != (1 if patch.side == "fa" else 0):
            total.index_add_(1 - block.dim, own, delta.index_select(block.dim, block.index))
        elif block.is_shared:
            total.index_add_(block.dim, torch.searchsorted(block.index, own), delta)
        else:
            total.add_(delta)
    return total


class AdapterPatcher:
    """Writes adapters into the plain weights of a model, and adds them to the outputs of its quantised layers.

    Contributions to an output are added adapter by adapter in the order of their names. When an adapter is removed,
    the layer is restored bit for bit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = WeightPatcher(model)
        self._quantised = {
            canonical(name): _QuantisedLayer(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer) and is_quantised(module.weight)
        }

    @property
    def names(self) -> tuple[str, ...]:
        return self._weights.names

    def write(self, name: str, factors: Mapping[str, Factor], side: Side, strength: float = 1.0) -> None:
        """Write an adapter as `WeightPatcher.write` does; quantised layers are allowed."""
        for key in factors.keys() & self._quantised.keys():
            module = self._quantised[key].module
            check_factor(key, factors[key], side, (module.out_features, module.in_features))
        plain = {key: factor for key, factor in factors.items() if key not in self._quantised}
        self._weights.write(name, plain, side, strength)
        for key, layer in self._quantised.items():
            factor = factors.get(key)
            layer.set(name, factor and Factor(factor.index, factor.weight * strength), side)

    def restore(self, name: str) -> None:
        """Remove an adapter."""
        self._weights.restore(name)
        for layer in self._quantised.values():
            layer.set(name, None)


class _QuantisedLayer:
    """Adds contributions to the output of one layer, by a forward hook that exists only while there are any."""

    def __init__(self, module: Any) -> None:
        self.module, self._hook = module, None
        self._contributions: dict[str, tuple[Factor, Side]] = {}  # by adapter, with the strength in the factor

    def set(self, name: str, factor: Factor | None, side: Side = "fa") -> None:
        """Set or remove an adapter's contribution."""
        self._contributions.pop(name, None)
        if factor is not None:
            new: tuple[str, tuple[Factor, Side]] = (name, (_on_device_of(self.module.weight, factor), side))
            self._contributions = dict(sorted([*self._contributions.items(), new]))
        if self._contributions and self._hook is None:
            self._hook = self.module.register_forward_hook(self._add)
        elif not self._contributions and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output with all contributions. They are never trained, so no gradient is needed."""
        (x,), rows = inputs, output.flatten(0, -2).clone()  # (tokens, out)
        with without_autocast(rows.device.type):
            for factor, side in self._contributions.values():
                weight = factor.weight.to(rows.dtype)
                if side == "fa":
                    rows += gather_inputs(x, factor.index, rows.dtype) @ weight.t()
                else:
                    rows.index_add_(-1, factor.index, x.flatten(0, -2).to(rows.dtype) @ weight.t())
        return rows.view(output.shape)


def written_side(adapter: Adapter) -> Side:
    """Return what `written_factors` returns: columns, or an SBoRA-FB's rows."""
    return "fa" if adapter.dense else adapter.spec.side


def written_factors(adapter: Adapter, layers: Mapping[str, nn.Linear]) -> dict[str, Factor]:
    """Return an adapter's columns or rows; of a change of whole weights, all columns.

    Args:
        layers: "<component>.<canonical layer>" -> layer, with nothing written into it (DoRA reads its weight).
    """
    changes = {key: dense.delta(full_weight(layers[key].weight)) for key, dense in adapter.dense.items()}
    return adapter.factors | {key: Factor(torch.arange(delta.shape[1]), delta) for key, delta in changes.items()}


def needs_original(adapter: Adapter) -> bool:
    """Return whether what an adapter adds depends on the base weight."""
    return any(dense.magnitude is not None for dense in adapter.dense.values())
