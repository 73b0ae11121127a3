"""The active adapters of a layer as one index and one factor: joined once, and kept as long as nothing has changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Side


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter's index (r,), trained factor ((out, r) for fa, (r, in) for fb) and scaling."""

    index: Tensor
    factor: Tensor
    scaling: float

    def scaled(self) -> Tensor:
        return self.factor if self.scaling == 1 else self.factor * self.scaling


@dataclass(frozen=True, eq=False)
class _Kept:
    parts: list[Part]  # the factors detached, which keeps their memory from being given to others
    versions: list[int]
    index: Tensor
    weight: Tensor

    def is_of(self, parts: Sequence[Part]) -> bool:
        return len(parts) == len(self.parts) and all(
            part.index is kept.index
            and part.scaling == kept.scaling
            and part.factor.data_ptr() == kept.factor.data_ptr()
            and part.factor._version == version
            for part, kept, version in zip(parts, self.parts, self.versions, strict=True)
        )


class Joiner:
    """Joins the parts of one layer and one side along the rank, and keeps the last result if no gradient is needed.

    What changes a factor so that autograd does not notice (an in-place operation on `.data`) is not noticed here
    either.
    """

    def __init__(self, side: Side) -> None:
        self._dim = 1 if side == "fa" else 0
        self._kept: _Kept | None = None

    def __call__(self, parts: Sequence[Part]) -> tuple[Tensor | None, Tensor | None]:
        """The index (R,) and the factor (out, R) for fa, (R, in) for fb, scale included; twice None for no parts."""
        if not parts:
            return None, None
        if len(parts) == 1:
            return parts[0].index, parts[0].scaled()
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or any(p.factor.is_inference() for p in parts):
            return self._join(parts)
        if self._kept is None or not self._kept.is_of(parts):
            kept = [Part(part.index, part.factor.detach(), part.scaling) for part in parts]
            self._kept = _Kept(kept, [part.factor._version for part in parts], *self._join(kept))
        return self._kept.index, self._kept.weight

    def _join(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        index = torch.cat([part.index for part in parts])
        return index, torch.cat([part.scaled() for part in parts], dim=self._dim)
