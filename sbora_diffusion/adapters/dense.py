"""What methods other than SBoRA add to a layer: low-rank factors, with DoRA a magnitude, or a whole matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sbora_diffusion.utils.errors import SboraError

PARTS = ("up", "down", "magnitude", "delta")


@dataclass(frozen=True, eq=False)
class Dense:
    """A change of a whole weight; every scale is folded in. Float32.

    Attributes:
        up: (out, r), or without `down` the change itself (out, in).
        down: (r, in).
        magnitude: (out, 1) of DoRA (Liu et al. 2024, eq. 5), the norms of the new weight's rows.
    """

    up: Tensor
    down: Tensor | None = None
    magnitude: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """What a file holds, by PARTS."""
        if self.down is None:
            return {"delta": self.up}
        found = {"up": self.up, "down": self.down}
        return found if self.magnitude is None else found | {"magnitude": self.magnitude}

    def delta(self, weight: Tensor | None) -> Tensor:
        """Return ΔW (out, in), float32 on the CPU; DoRA's alone needs the untouched base weight (out, in)."""
        change = self.up if self.down is None else self.up @ self.down
        if self.magnitude is None:
            return change
        assert weight is not None
        original = weight.detach().to("cpu", torch.float32)
        turned = original + change
        return self.magnitude * turned / turned.norm(dim=1, keepdim=True) - original

    def check_fits(self, layer: str, shape: tuple[int, int]) -> None:
        """SboraError unless it changes a weight of shape (out, in)."""
        inner = self.up.shape[1] if self.down is None else self.down.shape[1]
        if (self.up.shape[0], inner) != shape:
            raise SboraError(f"the adapter's change of layer {layer} does not fit its weight of shape {shape}")


def dense_of(layer: str, parts: Mapping[str, Tensor]) -> Dense:
    """The inverse of `Dense.parts`."""
    if parts.keys() == {"delta"}:
        return Dense(parts["delta"])
    if not {"up", "down"} <= parts.keys() <= {"up", "down", "magnitude"}:
        raise SboraError(f"layer {layer} has the parts {', '.join(sorted(parts))}, expected delta, or up and down")
    up, down, magnitude = parts["up"], parts["down"], parts.get("magnitude")
    fits = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
    if not fits or (magnitude is not None and magnitude.shape != (len(up), 1)):
        raise SboraError(f"layer {layer}: up, down and magnitude do not fit each other")
    return Dense(up, down, magnitude)
