"""Reserve the columns or rows that a training owns."""

import json
import logging
from pathlib import Path

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.data.concept import Concept, concept_name
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library
from sbora_diffusion.methods.registry import configure, find_method, method_side
from sbora_diffusion.models.base import Base, load_unplaced
from sbora_diffusion.models.loading import find_kind
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)


def space_of(base: Base, side: Side, seed: int) -> Space:
    """Return the columns (fa) or rows (fb) of a base model that the ledger allocates."""
    return Space(base_id=base.id, base_fingerprint=base.fingerprint, side=side, seed=seed, widths=base.widths(side))


def reserve_for(
    concept: Concept, base: Base, config: TrainConfig, library: Library, pinned: Interval | None
) -> Interval | None:
    """Reserve an interval for a training until it ends; return None if its method owns none."""
    if find_method(config.method.name).owns_interval:
        space = space_of(base, method_side(config.method.name), config.method.basis_seed)
        return library.reserve(space, config.method.rank, concept.name, pinned)
    library.check_not_in_training(concept.name)
    if pinned:
        raise SboraError(f"got --interval {pinned}, but {config.method.name} owns no columns")
    return None


def reserve_interval(name: str, base_name: str, method: str, rank: int, pinned: str, *, library: Library) -> Interval:
    """Reserve an interval for a concept that will be trained later, here or elsewhere."""
    if name != (valid := concept_name(name)):
        raise SboraError(f"got {name!r}, which is no concept's name", f"reserve {valid or 'a word'}")
    if not find_method(method).owns_interval:
        raise SboraError(f"{method} owns no columns", "train without a reservation")
    config = configure(find_kind(base_name), method, {"rank": str(rank)})
    wanted = Interval.parse(pinned) if pinned else None
    base = load_unplaced(base_name)
    space = space_of(base, method_side(method), config.method.basis_seed)
    interval = library.reserve(space, rank, name, wanted, lasting=True)
    log.info(
        "next: sbora-diffusion train --concept %s --base %s --method %s --rank %d; elsewhere with --interval %s",
        *(name, base_name, method, rank, interval),
    )
    return interval


def interval_of_run(run_folder: Path) -> Interval | None:
    """Return the interval of the training in a run folder, or None if there is no training or it owns none."""
    try:
        text = json.loads((run_folder / "run.json").read_bytes())["interval"]
        return None if text == "None" else Interval.parse(text)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise SboraError(f"cannot read {run_folder / 'run.json'} ({error})", hint="Start over with --force.") from None
