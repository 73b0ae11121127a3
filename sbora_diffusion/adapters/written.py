"""Adapters written into the weights of a model, and taken out again bit for bit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side, canonical
from sbora_diffusion.adapters.file import Factor, check_factor
from sbora_diffusion.adapters.linear_function import is_quantised, overwrite
from sbora_diffusion.utils.errors import SboraError


@dataclass(frozen=True, eq=False)
class _Written:
    factors: dict[str, Factor]  # each moved to its weight's device once, and again if the model has moved
    side: Side
    strength: float


@dataclass(frozen=True, eq=False)
class _Block:
    """The untouched entries of one weight in the columns (dim 1) or rows (dim 0) that are written."""

    dim: int
    index: Tensor  # (c,), of one adapter in its own order, of several sorted
    values: Tensor  # (out, c) or (c, in)
    is_shared: bool  # by several adapters


class WrittenWeights:
    """The adapters that are written into a model's base weights, with or without PEFT layers around them.

    The weights depend only on which adapters are written and how strongly, not on what happened before: touched
    entries are the original plus all contributions, summed in float32 in the order of the adapters' names. Only the
    originals of touched columns and rows are kept. As long as something is written, nobody else may change these
    weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: dict[str, _Written] = {}
        self._originals: dict[str, list[_Block]] = {}
        self._unfinished: set[str] = set()  # layers that an interrupt has left between two states

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._written))

    def write(self, name: str, factors: Mapping[str, Factor], side: Side, strength: float = 1.0) -> None:
        """Write an adapter, in place of an earlier one of the same name.

        Args:
            factors: by canonical layer, as `Adapter.component` gives them; no index occurs twice in one.
            strength: multiplies the whole adapter, may be negative or above one.

        Raises:
            SboraError: a layer that is missing, does not fit, is quantised or merged by PEFT. Nothing is changed then.
        """
        if not math.isfinite(strength):
            raise SboraError(f"got strength {strength} for {name!r}, expected a finite number")
        weights = self._weights()
        for layer, factor in factors.items():
            _check_writable(layer, factor, side, weights)
        before = self._written[name].factors if name in self._written else {}
        self._written[name] = _Written(dict(factors), side, strength)
        self._rewrite({*before, *factors}, weights)

    def restore(self, name: str) -> None:
        """Take an adapter out: the weights are as if it had never been written."""
        if name not in self._written:
            raise SboraError(f"{name!r} is not written into the weights, only {', '.join(self.names) or 'nothing'} is")
        weights = self._weights()
        self._rewrite(self._written.pop(name).factors, weights)

    def restore_all(self) -> None:
        """Take all adapters out: the weights are the original ones, bit for bit."""
        weights = self._weights()
        self._written.clear()
        self._rewrite(list(self._originals), weights)

    def _weights(self) -> dict[str, Tensor]:
        """The base weights by canonical name, looked up anew each time: PEFT may have wrapped the layers meanwhile."""
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
        """Bring layers to what is to be written now; the originals are kept as long as an entry may be another's."""
        everything = [self._written[name] for name in self.names]
        self._unfinished.update(layers)
        for layer in sorted(self._unfinished):
            weight = weights[layer]
            _put_back(weight, self._originals.get(layer, ()))
            self._originals.pop(layer, None)
            written = [entry for entry in everything if layer in entry.factors]
            for entry in written:
                entry.factors[layer] = _beside(weight, entry.factors[layer])
            if written:
                blocks = self._originals[layer] = _untouched(weight, written, layer)
                sums = [_sum_block(block, written, layer).to(weight.dtype) for block in blocks]
                for block, values in zip(blocks, sums, strict=True):
                    overwrite(weight, block.dim, block.index, values)
            self._unfinished.discard(layer)


def _beside(weight: Tensor, factor: Factor) -> Factor:
    """The factor on the device of its weight."""
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


def _untouched(weight: Tensor, written: Sequence[_Written], layer: str) -> list[_Block]:
    """What adapters are about to replace in an original weight (out, in).

    Where a column and a row cross, both blocks will sum the same numbers in the same order.
    """
    blocks = []
    for dim, side in ((1, "fa"), (0, "fb")):
        indices = [entry.factors[layer].index for entry in written if entry.side == side]
        if indices:
            index = _union(indices)
            blocks.append(_Block(dim, index, weight.index_select(dim, index), len(indices) > 1))
    return blocks


def _sum_block(block: _Block, written: Sequence[_Written], layer: str) -> Tensor:
    """The original columns or rows, plus what all adapters add there, in float32 at least."""
    total = block.values.to(torch.promote_types(block.values.dtype, torch.float32), copy=True)
    for entry in written:
        own, delta = entry.factors[layer].index, entry.factors[layer].weight.to(total)
        delta = delta if entry.strength == 1 else delta * entry.strength
        if block.dim != (1 if entry.side == "fa" else 0):
            total.index_add_(1 - block.dim, own, delta.index_select(block.dim, block.index))
        elif block.is_shared:
            total.index_add_(block.dim, torch.searchsorted(block.index, own), delta)
        else:
            total.add_(delta)
    return total


def _put_back(weight: Tensor, blocks: Sequence[_Block]) -> None:
    for block in blocks:
        overwrite(weight, block.dim, block.index.to(weight.device), block.values.to(weight))


def _union(indices: Sequence[Tensor]) -> Tensor:
    """Of one adapter's index itself, in its order; of several, sorted."""
    return indices[0] if len(indices) == 1 else torch.cat(list(indices)).unique()
