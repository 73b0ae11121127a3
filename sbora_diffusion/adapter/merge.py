"""Several adapters become one, and a certificate says what that guarantees and what it does not."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from sbora_diffusion.adapter.basis import Side
from sbora_diffusion.adapter.file import Adapter, Factor, Spec
from sbora_diffusion.errors import SboraError

logger = logging.getLogger(__name__)


def merge(adapters: Sequence[Adapter], weights: Sequence[float], how: Literal["sum"]) -> Adapter:
    """Put adapters of one base together: ΔW = Σ weight · ΔW_i, over the union of their columns or rows.

    Shared columns are added, in float64. The result is the same, bit for bit, whatever the order of the arguments. A
    token that several adapters have is renamed in all but the first of them, by name and content: "<dog-2>".

    Raises:
        SboraError: adapters of different sides, seeds or base models, layers of different shapes, nothing to merge.
    """
    if how != "sum":
        raise SboraError(f"got merge method {how!r}, expected 'sum'")
    if len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise SboraError(f"got {len(adapters)} adapters and the weights {list(weights)}, expected one number for each")
    pairs = sorted(zip(adapters, weights, strict=True), key=lambda pair: (pair[0].spec.name, _digest(*pair)))
    adapters, weights = [adapter for adapter, _ in pairs], [weight for _, weight in pairs]
    _check_mergeable([adapter.spec for adapter in adapters])
    keys = sorted({key for adapter in adapters for key in adapter.factors})
    factors = {key: _sum_layer(key, adapters, weights) for key in keys}
    renamings = _renamings(adapters)
    tokens = {}
    for adapter, names in zip(adapters, renamings, strict=True):
        tokens |= _renamed_tokens(adapter, names)
    return Adapter(_merged_spec(adapters, weights, factors, renamings), factors, tokens)


def certify(adapters: Sequence[Adapter], widths: Mapping[str, int] | None = None) -> "Certificate":
    """Measure what a sum of these adapters shares and how large each is.

    Args:
        widths: how many columns (FA) or rows (FB) each layer has, by "<component>.<layer>": files do not know it.
    """
    _check_mergeable([adapter.spec for adapter in adapters])
    layers = {}
    for key in sorted({key for adapter in adapters for key in adapter.factors}):
        factors = {position: a.factors[key] for position, a in enumerate(adapters) if key in a.factors}
        owners = Counter(torch.cat([factor.index for factor in factors.values()]).tolist())
        layers[key] = LayerCertificate(
            overlap=sum(count > 1 for count in owners.values()),
            free=None if widths is None else widths[key] - len(owners),
            norms=tuple(float(factors[i].weight.norm()) if i in factors else 0.0 for i in range(len(adapters))),
        )
    return Certificate(tuple(adapter.spec.name for adapter in adapters), adapters[0].spec.side, layers)


@dataclass(frozen=True)
class LayerCertificate:
    """One layer of a certificate."""

    overlap: int  # columns or rows that more than one adapter writes
    free: int | None  # columns or rows that nobody writes, if the layer's width is known
    norms: tuple[float, ...]  # Frobenius norm of each adapter's ΔW, at strength one


@dataclass(frozen=True)
class Certificate:
    """What is known about a sum of adapters before anybody looks at a picture."""

    names: tuple[str, ...]
    side: Side
    layers: dict[str, LayerCertificate]

    @property
    def disjoint(self) -> bool:
        return not any(layer.overlap for layer in self.layers.values())

    def describe(self) -> str:
        """What is guaranteed, and what is not."""
        what = "column" if self.side == "fa" else "row"
        shared = [layer.overlap for layer in self.layers.values() if layer.overlap]
        if self.disjoint:
            lines = [f"disjoint: no {what} of {len(self.layers)} layers is written by two adapters, so any of them"]
            lines += ["can be taken out of the sum exactly, and their order does not matter"]
        else:
            lines = [f"not disjoint: {sum(shared)} {what}s in {len(shared)} of {len(self.layers)} layers have several"]
            lines += ["owners; there the adapters change the same weights"]
        free = [layer.free for layer in self.layers.values() if layer.free is not None]
        if free:
            lines.append(f"free: at least {min(free)} {what}s in every layer")
        for position, name in enumerate(self.names):
            norm = math.hypot(*(layer.norms[position] for layer in self.layers.values()))
            lines.append(f"‖ΔW‖ of {name}: {norm:.4g}")
        lines.append("not guaranteed: that concepts do not disturb each other; each acts on every activation")
        return "\n".join(lines)


def _check_mergeable(specs: Sequence[Spec]) -> None:
    if not specs:
        raise SboraError("got no adapters, expected at least one")
    for what in ("side", "seed", "base_fingerprint"):
        first, *others = sorted({str(getattr(spec, what)) for spec in specs})
        if others:
            raise SboraError(
                f"the adapters differ in {what.replace('_', ' ')}: {first} and {', '.join(others)}",
                hint="Train them for the same base model, with the same method and seed.",
            )


def _digest(adapter: Adapter, weight: float) -> bytes:
    """Tells adapters of the same name apart, whatever the order they come in."""
    return blake2b(adapter.to_bytes() + float(weight).hex().encode()).digest()


def _sum_layer(key: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Factor:
    """Σ weight · ΔW of one layer, over the ascending union of the indices."""
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
    """For each adapter, its tokens' names in the merge: the first owner keeps a name, the next gets "<name-2>"."""
    taken = {token for adapter in adapters for token in adapter.spec.tokens}
    kept, renamings = set(), []
    for adapter in adapters:
        names = {token: token for token in adapter.spec.tokens}
        for token in sorted(kept.intersection(names)):
            names[token] = next(name for name in _numbered(token) if name not in taken)
            taken.add(names[token])
            logger.warning("%s of %s is called %s in the merge", token, adapter.spec.name, names[token])
        kept.update(adapter.spec.tokens)
        renamings.append(names)
    return renamings


def _numbered(token: str) -> Iterator[str]:
    """<dog-2>, <dog-3>, …"""
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
) -> Spec:
    specs = [adapter.spec for adapter in adapters]
    pairs = list(zip(specs, renamings, strict=True))
    return Spec(
        side=specs[0].side,
        rank=max((len(factor.index) for factor in factors.values()), default=1),
        intervals=tuple(sorted({interval for spec in specs for interval in spec.intervals})),
        seed=specs[0].seed,
        base_id=specs[0].base_id,
        base_fingerprint=specs[0].base_fingerprint,
        tokens={names[token]: noun for spec, names in pairs for token, noun in spec.tokens.items()},
        name="+".join(spec.name for spec in specs),
        parents=tuple(parent for spec in specs for parent in spec.parents or (spec.name,)),
        recipe={"how": "sum", "weights": [[spec.name, w] for spec, w in zip(specs, weights, strict=True)]},
    )
