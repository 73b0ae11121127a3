"""Convert adapters to plain LoRAs, and back if one of the factors is one-hot."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval, Side, permutation
from sbora_diffusion.adapters.file import Adapter, Factor, check_fits
from sbora_diffusion.utils.errors import SboraError


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA in one layer: ΔW = scale · up @ down."""

    down: Tensor  # (r, in) float32, PEFT's A
    up: Tensor  # (out, r) float32, PEFT's B
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def to_loras(adapter: Adapter, layer_shapes: Mapping[str, tuple[int, int]]) -> dict[str, Lora]:
    """Convert an adapter to LoRAs of scale one: one-hot rows in `down` for FA, one-hot columns in `up` for FB.

    Low-rank adapters of other methods are returned as they are.

    If layers differ in rank, all are padded to the highest: diffusers misreads the scale of kohya files with several
    alphas, and vLLM supports only one rank and alpha.

    Args:
        layer_shapes: "<component>.<layer>" -> (out, in), of the adapter's layers at least.

    Raises:
        SboraError: the adapter does not fit these shapes, has no layer, or has changes that are no LoRA.
    """
    check_fits(adapter, layer_shapes)
    if not (adapter.factors or adapter.dense):
        raise SboraError(f"adapter {adapter.spec.name!r} has no layer", "It consists of a token only.")
    loras = {}
    for key, dense in adapter.dense.items():
        if dense.down is None or dense.magnitude is not None:
            raise SboraError(
                f"{adapter.spec.name!r} is of the method {adapter.spec.method_name}, whose change of {key} is no LoRA",
                "Write it into a pipeline for other programs: sbora-diffusion bake",
            )
        loras[key] = Lora(down=dense.down, up=dense.up)
    for key, factor in adapter.factors.items():
        out_dim, in_dim = layer_shapes[key]
        rows = torch.eye(len(factor.index), dtype=torch.float32)
        if adapter.spec.side == "fa":
            loras[key] = Lora(down=torch.zeros(len(rows), in_dim).index_copy_(1, factor.index, rows), up=factor.weight)
        else:
            loras[key] = Lora(down=factor.weight, up=torch.zeros(out_dim, len(rows)).index_copy_(0, factor.index, rows))
    rank = common_rank(loras)
    return {key: _padded(lora, rank) for key, lora in loras.items()}


def _padded(lora: Lora, rank: int) -> Lora:
    more = rank - lora.rank
    return Lora(F.pad(lora.down, (0, 0, 0, more)), F.pad(lora.up, (0, more)), lora.scale)


def common_rank(loras: Mapping[str, Lora]) -> int:
    """Return the highest rank of any layer."""
    return max(lora.rank for lora in loras.values())


def from_loras(loras: Mapping[str, Lora], prefer: Side = "fa") -> tuple[Side, dict[str, Factor]]:
    """Invert `to_loras`: find the one-hot factors, and fold their scale into the other ones.

    Columns or rows that occur twice (concatenated LoRAs) are added in float64; padding is dropped.

    Args:
        prefer: the side to choose if both factors are one-hot.

    Raises:
        SboraError: a LoRA without a one-hot factor, or one-hot factors that are not all of one side.
    """
    if not loras:
        raise SboraError("holds no LoRA layer")
    sides: tuple[Side, ...] = ("fa", "fb") if prefer == "fa" else ("fb", "fa")
    found = {}
    for side in sides:
        factors = {key: _factor(lora, side) for key, lora in loras.items()}
        found[side] = {key: factor for key, factor in factors.items() if factor is not None}
        if len(found[side]) == len(loras):
            return side, found[side]
    dense = [key for key in loras if not any(key in factors for factors in found.values())]
    if dense:
        raise SboraError(
            f"is a dense LoRA, not an SBoRA adapter: neither factor of layer {dense[0]} is one-hot "
            f"({len(dense)} of {len(loras)} layers)",
            hint="Use it directly in diffusers or ComfyUI: it owns no columns, so it cannot be removed exactly.",
        )
    raise SboraError(
        "has one-hot columns in some layers and one-hot rows in others", hint="Export SBoRA-FA and SBoRA-FB separately."
    )


def owned_intervals(
    factors: Mapping[str, Factor], widths: Mapping[str, int], seed: int, claimed: Sequence[Interval] = ()
) -> tuple[Interval, ...]:
    """Find the intervals of the ledger that the indices belong to.

    Args:
        widths: columns (FA) or rows (FB) of each layer.
        claimed: the intervals in the file's metadata, kept if all indices lie in them.

    Returns:
        The intervals; none if the layers differ in their positions.
    """
    owned: set[tuple[int, ...]] = set()
    for key, factor in factors.items():
        if int(factor.index.max()) >= widths[key]:
            raise SboraError(f"layer {key} writes {int(factor.index.max())}, but has the positions 0:{widths[key]}")
        position = permutation(key.partition(".")[2], widths[key], seed).argsort()
        owned.add(tuple(position[factor.index].sort().values.tolist()))
    if set().union(*owned) <= {position for each in claimed for position in range(each.start, each.stop)}:
        return tuple(claimed)
    return tuple(_runs(owned.pop())) if len(owned) == 1 else ()


def check_lora(key: str, lora: Lora) -> None:
    """Raise SboraError unless the factors are finite matrices that can be multiplied."""
    for name, factor in (("down", lora.down), ("up", lora.up)):
        if factor.ndim != 2 or factor.numel() == 0:
            shape = "×".join(map(str, factor.shape))
            raise SboraError(f"the {name} factor of layer {key} has the shape {shape}, SBoRA is for linear layers only")
        if not factor.is_floating_point():
            raise SboraError(f"the {name} factor of layer {key} has dtype {factor.dtype}, expected floating point")
        if not factor.isfinite().all():
            raise SboraError(f"the {name} factor of layer {key} has values that are not finite")
    if lora.up.shape[1] != lora.rank:
        raise SboraError(f"the factors of layer {key} have the ranks {lora.rank} (down) and {lora.up.shape[1]} (up)")
    if not math.isfinite(lora.scale):
        raise SboraError(f"layer {key} has the scale {lora.scale}")


def _factor(lora: Lora, side: Side) -> Factor | None:
    """Return a LoRA's change of single columns (FA) or rows (FB); None if that factor is not one-hot."""
    one_hot, trained = (lora.down, lora.up) if side == "fa" else (lora.up.t(), lora.down.t())  # (r, dim), (other, r)
    is_used = one_hot.any(1)  # the others are padding
    one_hot, trained = one_hot[is_used], trained[:, is_used]
    nonzero = one_hot != 0
    if len(one_hot) == 0 or not (nonzero.sum(1) == 1).all():
        return None
    index = nonzero.int().argmax(1)
    values = one_hot.gather(1, index.unsqueeze(1)).squeeze(1).double() * lora.scale  # (r,)
    weight = trained.double() * values
    if len(index.unique()) < len(index):
        index, place = index.unique(return_inverse=True)
        weight = weight.new_zeros(len(weight), len(index)).index_add_(1, place, weight)
    return Factor(index, (weight if side == "fa" else weight.t()).float().contiguous())


def _runs(positions: Sequence[int]) -> list[Interval]:
    """Convert ascending positions to intervals."""
    runs: list[Interval] = []
    for position in positions:
        if runs and runs[-1].stop == position:
            runs[-1] = Interval(runs[-1].start, runs[-1].rank + 1)
        else:
            runs.append(Interval(position, 1))
    return runs
