"""Adapters beside weights that cannot be written into, for they are quantised: a term added to the layer's output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side, canonical
from sbora_diffusion.adapters.file import Factor, check_factor
from sbora_diffusion.adapters.linear_function import gathered_inputs, is_quantised, without_autocast
from sbora_diffusion.adapters.written import WrittenWeights


class AdapterPatcher:
    """Adapters in the weights of a model where these are plain, as `WrittenWeights` has them, else beside them.

    What stands beside a weight is added to the layer's output, adapter by adapter in the order of their names; taken
    out, the layer is what it was, bit for bit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._inside = WrittenWeights(model)
        self._beside = {name: _Layer(module) for name, module in _quantised_layers(model).items()}

    @property
    def names(self) -> tuple[str, ...]:
        return self._inside.names

    def write(self, name: str, factors: Mapping[str, Factor], side: Side, strength: float = 1.0) -> None:
        """See `WrittenWeights.write`; no layer is refused for being quantised."""
        for layer, factor in factors.items():
            if layer in self._beside:
                check_factor(layer, factor, side, self._beside[layer].shape)
        self._inside.write(name, {key: f for key, f in factors.items() if key not in self._beside}, side, strength)
        for key, layer in self._beside.items():
            factor = factors.get(key)
            layer.put(name, factor and _Term(factor.index, factor.weight * strength, side))

    def restore(self, name: str) -> None:
        """Take an adapter out."""
        self._inside.restore(name)
        for layer in self._beside.values():
            layer.put(name, None)


@dataclass(frozen=True, eq=False)
class _Term:
    """Columns (fa) or rows (fb) with their scaled factor."""

    index: Tensor
    weight: Tensor
    side: Side


class _Layer:
    """What stands beside one layer."""

    def __init__(self, module: Any) -> None:
        self._module, self._handle = module, None
        self._terms: dict[str, _Term] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._module.out_features, self._module.in_features

    def put(self, name: str, term: _Term | None) -> None:
        """Have this term under this name, or none."""
        self._terms.pop(name, None)
        if term is not None:
            device = self._module.weight.device
            term = _Term(term.index.to(device), term.weight.to(device), term.side)
            self._terms = dict(sorted([*self._terms.items(), (name, term)]))
        if self._terms and self._handle is None:
            self._handle = self._module.register_forward_hook(self._added)
        elif not self._terms and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _added(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Without gradients: what is trained is not here."""
        (x,), rows = inputs, output.flatten(0, -2).clone()  # (tokens, out)
        with without_autocast(rows.device.type):
            for term in self._terms.values():
                weight = term.weight.to(rows.dtype)
                if term.side == "fa":
                    rows += gathered_inputs(x, term.index, rows.dtype) @ weight.t()
                else:
                    rows.index_add_(-1, term.index, x.flatten(0, -2).to(rows.dtype) @ weight.t())
        return rows.view(output.shape)


def _quantised_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """By canonical name, those that PEFT has wrapped, too."""
    return {
        canonical(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer) and is_quantised(module.weight)
    }
