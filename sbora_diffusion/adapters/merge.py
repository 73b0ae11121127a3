"""Merge several adapters into one by a sum."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter, Factor, Spec
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import joined_names

logger = logging.getLogger(__name__)

_BAKE = "write them all into one pipeline: sbora-diffusion bake NAME NAME --out FOLDER"
_HINTS = {
    "side": f"FA writes columns and FB rows; a file holds one kind. Train them with one method, or {_BAKE}",
    "method_name": f"Each method has its own merge. Train them with one method, or {_BAKE}",
    "embedding_layers": "Train them with the same layerwise_tokens.",
    "seed": f"Their intervals refer to different permutations. Train them with one basis_seed, or {_BAKE}",
    "base_fingerprint": "Train them for the same base model.",
}


def merge(adapters: Sequence[Adapter], weights: Sequence[float], how: Literal["sum"]) -> Adapter:
    """Sum adapters of one base: ΔW = Σ weight · ΔW_i, over the union of their columns or rows.

    Shared columns are added in float64. The result does not depend on the order of the arguments, bit for bit. A token
    that several adapters have is renamed in all but the first, in the order of names and contents: "<dog-2>".

    Raises:
        SboraError: no adapters, different sides, seeds or base models, or layers of different shapes.
    """
    if how != "sum":
        raise SboraError(f"got merge method {how!r}, expected 'sum'")
    adapters, weights = in_order(adapters, weights)
    keys = sorted({key for adapter in adapters for key in adapter.factors})
    factors = {key: _sum_layer(key, adapters, weights) for key in keys}
    return put_together(adapters, weights, factors, {"how": "sum"})


def merged_name(adapters: Sequence[Adapter]) -> str:
    """Return the name of a merge, such as `cat+dog`."""
    return joined_names(sorted(adapter.spec.name for adapter in adapters))


def in_order(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[list[Adapter], list[float]]:
    """Sort adapters by name and content, so that no merge depends on the order of its arguments.

    Raises:
        SboraError: as in `merge`.
    """
    if len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        got = f"{len(adapters)} adapters and the weights {list(weights)}"
        raise SboraError(f"got {got}, expected one finite weight for each")

    def place(pair: tuple[Adapter, float]) -> tuple[str, bytes]:
        adapter, weight = pair
        return adapter.spec.name, blake2b(adapter.to_bytes() + float(weight).hex().encode()).digest()

    pairs = sorted(zip(adapters, weights, strict=True), key=place)
    specs = [adapter.spec for adapter, _ in pairs]
    check_mergeable(specs)
    for parent, number in Counter(parent for spec in specs for parent in spec.parents or (spec.name,)).items():
        if number > 1:
            logger.warning(
                "%s is in %d of the merged adapters: it counts several times in columns that they share", parent, number
            )
    return [adapter for adapter, _ in pairs], [weight for _, weight in pairs]


def put_together(
    adapters: Sequence[Adapter], weights: Sequence[float], factors: Mapping[str, Factor], recipe: Mapping[str, Any]
) -> Adapter:
    """Make the adapter of merged factors, with all tokens (renamed if several adapters have one) and its parents."""
    renamings = _renamings(adapters)
    tokens = {}
    for adapter, names in zip(adapters, renamings, strict=True):
        tokens |= _renamed_tokens(adapter, names)
    return Adapter(_merged_spec(adapters, weights, factors, renamings, recipe), dict(factors), tokens)


def distinct_tokens(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Rename later adapters and tokens so that no two adapters have a name or a token in common."""
    named = []
    for adapter, names in zip(adapters, _renamings(adapters), strict=True):
        spec = adapter.spec
        taken = {other.spec.name for other in (*adapters, *named)}
        is_free = all(other.spec.name != spec.name for other in named)
        name = spec.name if is_free else next(name for name in _numbered(spec.name) if name not in taken)
        spec = replace(spec, name=name, tokens={names[token]: noun for token, noun in spec.tokens.items()})
        named.append(replace(adapter, spec=spec, tokens=_renamed_tokens(adapter, names)))
    return named


def check_mergeable(specs: Sequence[Spec], same: Sequence[str] = tuple(_HINTS)) -> None:
    """Raise SboraError unless there are adapters, all with the same value of each attribute in `same`."""
    if not specs:
        raise SboraError("got no adapters, expected at least one")
    for what in same:
        first, *others = sorted({str(getattr(spec, what)) for spec in specs})
        if others:
            raise SboraError(
                f"the adapters differ in {what.replace('_', ' ')}: {first} and {', '.join(others)}", hint=_HINTS[what]
            )


def _sum_layer(key: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Factor:
    """Return Σ weight · ΔW of one layer, over the ascending union of the indices."""
    owners = [(a.factors[key], weight) for a, weight in zip(adapters, weights, strict=True) if key in a.factors]
    union = torch.cat([factor.index for factor, _ in owners]).unique()  # sorted
    dim = 1 if adapters[0].spec.side == "fa" else 0
    size = owners[0][0].weight.shape[1 - dim]
    if any(factor.weight.shape[1 - dim] != size for factor, _ in owners):
        raise SboraError(f"the adapters' layers {key} have different shapes")
    total = torch.zeros((size, len(union)) if dim == 1 else (len(union), size), dtype=torch.float64)
    for factor, weight in owners:
        total.index_add_(dim, torch.searchsorted(union, factor.index), factor.weight.double() * weight)
    return Factor(union, total.float())


def _renamings(adapters: Sequence[Adapter]) -> list[dict[str, str]]:
    """Return each adapter's token names in the merge: the first owner keeps a name, the next gets "<name-2>".

    Names that differ only in case are equal, because tokenizers ignore case.
    """
    taken = {token.casefold() for adapter in adapters for token in adapter.spec.tokens}
    kept, renamings = set[str](), []
    for adapter in adapters:
        names = {token: token for token in adapter.spec.tokens}
        for token in sorted(token for token in names if token.casefold() in kept):
            names[token] = next(name for name in _numbered(token) if name.casefold() not in taken)
            taken.add(names[token].casefold())
            logger.warning("%s of %s is renamed to %s in the merge", token, adapter.spec.name, names[token])
        kept.update(token.casefold() for token in adapter.spec.tokens)
        renamings.append(names)
    return renamings


def _numbered(token: str) -> Iterator[str]:
    """Generate <dog-2>, <dog-3>, …"""
    stem, end = (token[:-1], ">") if token.endswith(">") else (token, "")
    return (f"{stem}-{number}{end}" for number in count(2))


def _renamed_tokens(adapter: Adapter, names: Mapping[str, str]) -> dict[str, Tensor]:
    split = {key: key.partition(".") for key in adapter.tokens}
    return {f"{split[key][0]}.{names[split[key][2]]}": embedding for key, embedding in adapter.tokens.items()}


def _merged_spec(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    factors: Mapping[str, Factor],
    renamings: Sequence[Mapping[str, str]],
    recipe: Mapping[str, Any],
) -> Spec:
    specs = [adapter.spec for adapter in adapters]
    pairs = list(zip(specs, renamings, strict=True))
    return replace(
        specs[0],
        rank=max((len(factor.index) for factor in factors.values()), default=1),
        intervals=tuple(sorted({interval for spec in specs for interval in spec.intervals})),
        tokens={names[token]: noun for spec, names in pairs for token, noun in spec.tokens.items()},
        name=merged_name(adapters),
        parents=tuple(parent for spec in specs for parent in spec.parents or (spec.name,)),
        recipe={**recipe, "weights": [[spec.name, w] for spec, w in zip(specs, weights, strict=True)]},
        versions={},
        metrics={},
    )
