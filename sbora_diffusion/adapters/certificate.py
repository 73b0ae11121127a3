"""Certify what a sum of adapters guarantees, what it does not, and how large it is, from the files alone."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.adapters.merge import check_mergeable


@dataclass(frozen=True)
class LayerCertificate:
    """One layer of a certificate, or a group of layers: summed overlaps, the minimum of free, and joint norms."""

    overlap: int  # columns or rows that several adapters write
    free: int | None  # columns or rows that no adapter writes, if the layer's width is known
    norms: tuple[float, ...]  # Frobenius norm of each adapter's ΔW, at strength one


@dataclass(frozen=True)
class Certificate:
    """Overlaps, free columns and norms of a sum of adapters."""

    names: tuple[str, ...]
    side: Side
    layers: dict[str, LayerCertificate]  # by "<component>.<layer>"
    collisions: dict[tuple[str, str], int]  # pairs that share columns or rows -> how many, over all layers

    @property
    def disjoint(self) -> bool:
        return not any(layer.overlap for layer in self.layers.values())

    @property
    def groups(self) -> dict[str, tuple[int, LayerCertificate]]:
        """Layer groups, such as "unet.down_blocks.attn1": their number of layers, and a joint certificate."""
        members: dict[str, list[LayerCertificate]] = {}
        for key, layer in self.layers.items():
            members.setdefault(layer_group(key), []).append(layer)
        return {group: (len(layers), _combine(layers)) for group, layers in members.items()}

    def describe(self) -> str:
        """Return what is guaranteed for these files, what is not, and the norms, one line each."""
        what, total = ("column" if self.side == "fa" else "row"), _combine(self.layers.values())
        lines = self._guarantees(what) if self.disjoint else self._overlaps(what)
        lines.append("not guaranteed: that concepts do not disturb each other; each acts on every activation")
        if total.free is not None:
            lines.append(f"free: at least {total.free} {what}s in every layer")
        lines += [f"‖ΔW‖ of {name}: {norm:.4g}" for name, norm in zip(self.names, total.norms, strict=True)]
        return "\n".join(lines)

    def _guarantees(self, what: str) -> list[str]:
        return [
            f"disjoint: no {what} of {len(self.layers)} layers is written by two adapters",
            "guaranteed: each weight is written by at most one concept",
            "guaranteed: the sum is the same in any order, bit for bit",
            "guaranteed: each of them can be removed again, bit for bit",
        ]

    def _overlaps(self, what: str) -> list[str]:
        shared = [layer.overlap for layer in self.layers.values() if layer.overlap]
        return [
            f"not disjoint: {sum(shared)} {what}s in {len(shared)} of {len(self.layers)} layers are written by several",
            *(f"  {one} and {other} share {number}" for (one, other), number in self.collisions.items()),
            "not guaranteed: that a concept can be removed from a merged file, or that other tools give the same bits",
            "guaranteed: sums are in a fixed order here, and applied concepts are removed bit for bit",
        ]


def certify(adapters: Sequence[Adapter], widths: Mapping[str, int] | None = None) -> Certificate:
    """Compare the indices of adapters, and measure the norm of each.

    Args:
        widths: the number of columns (FA) or rows (FB) of each layer, by "<component>.<layer>"; it is not in the files.

    Raises:
        SboraError: no adapters, or adapters of different sides or base models.
    """
    check_mergeable([adapter.spec for adapter in adapters], ("side", "base_fingerprint"))
    layers, collisions = {}, Counter()
    for key in sorted({key for adapter in adapters for key in adapter.factors}):
        factors = {position: a.factors[key] for position, a in enumerate(adapters) if key in a.factors}
        layers[key] = _certify_layer(factors, len(adapters), (widths or {}).get(key))
        owned = {position: set(factor.index.tolist()) for position, factor in factors.items()}
        for i, j in combinations(owned, 2):
            collisions[i, j] += len(owned[i] & owned[j])
    names = tuple(adapter.spec.name for adapter in adapters)
    pairs = {(names[i], names[j]): number for (i, j), number in sorted(collisions.items()) if number}
    return Certificate(names, adapters[0].spec.side, layers, pairs)


def layer_group(key: str) -> str:
    """Return a layer's group: "unet.down_blocks.0.attentions.1…attn1.to_q" is in "unet.down_blocks.attn1"."""
    component, *path = [part for part in key.split(".") if not part.isdigit()]
    attention = [part for part in path if re.fullmatch(r"attn\d*|.*_attn", part)]
    return ".".join([component, *path[:1], *attention[-1:]])


def _certify_layer(factors: Mapping[int, Factor], number: int, width: int | None) -> LayerCertificate:
    owners = Counter(torch.cat([factor.index for factor in factors.values()]).tolist())
    return LayerCertificate(
        overlap=sum(count > 1 for count in owners.values()),
        free=None if width is None else width - len(owners),
        norms=tuple(float(factors[i].weight.norm()) if i in factors else 0.0 for i in range(number)),
    )


def _combine(layers: Iterable[LayerCertificate]) -> LayerCertificate:
    layers = list(layers)
    free = [layer.free for layer in layers if layer.free is not None]
    return LayerCertificate(
        overlap=sum(layer.overlap for layer in layers),
        free=min(free, default=None),
        norms=tuple(math.hypot(*norms) for norms in zip(*(layer.norms for layer in layers), strict=True)),
    )
