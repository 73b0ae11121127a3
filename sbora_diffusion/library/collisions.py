"""Find columns or rows of an adapter that others in a library own."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from sbora_diffusion.adapters.basis import indices
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.library.ledger import Owner
from sbora_diffusion.library.library import Library
from sbora_diffusion.utils.errors import SboraError


def collisions(adapter: Adapter, library: Library) -> list[str]:
    """Describe each concept and reservation of the same base model and side that shares columns with an adapter.

    Columns are compared, not intervals: imported adapters may have none. Invalid files are skipped, and so is the
    adapter's own name.
    """
    spec = adapter.spec
    lines = []
    for name in library.names():
        other = _load(library, name) if name != spec.name else None
        if other and (other.spec.base_fingerprint, other.spec.side) == (spec.base_fingerprint, spec.side):
            lines += _shared(adapter, name, {key: factor.index for key, factor in other.factors.items()})
    widths = library.widths(spec.base_fingerprint, spec.side) or {}
    for owner in library.owners(spec.base_fingerprint, spec.side):
        if owner.name != spec.name and owner.state != "trained":
            lines += _shared(adapter, f"{owner.name} ({owner.state}, {owner.interval})", _reserved(owner, widths))
    return lines


def _load(library: Library, name: str) -> Adapter | None:
    try:
        return Adapter.load(library.path(name))
    except SboraError:
        return None


def _reserved(owner: Owner, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the columns or rows of an interval by layer; layers that are too narrow are not adapted by its owner."""
    return {
        key: indices(key.partition(".")[2], dim, owner.interval, owner.seed)
        for key, dim in widths.items()
        if owner.interval.stop <= dim
    }


def _shared(adapter: Adapter, name: str, taken: Mapping[str, Tensor]) -> Iterator[str]:
    what = "columns" if adapter.spec.side == "fa" else "rows"
    counts = [
        len(set(factor.index.tolist()) & set(taken[key].tolist()))
        for key, factor in adapter.factors.items()
        if key in taken
    ]
    if layers := sum(count > 0 for count in counts):
        yield f"{name}: {sum(counts)} {what} in {layers} of {len(adapter.factors)} layers, at most {max(counts)} in one"
