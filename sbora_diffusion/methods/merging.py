"""Merge concepts of any method: by sum, by `fuse`, or as the method's paper does."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sbora_diffusion.adapters.basis import Spec
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.fuse import PRIOR_WEIGHT
from sbora_diffusion.adapters.merge import check_mergeable
from sbora_diffusion.library.library import Library, load_adapters
from sbora_diffusion.methods.registry import Merge, MergeRequest, Progress, find_method
from sbora_diffusion.utils.errors import SboraError

if TYPE_CHECKING:
    from sbora_diffusion.models.base import Base

log = logging.getLogger(__name__)


def merge(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    how: str = "",
    base: "Base | str | None" = None,
    prior_weight: float = PRIOR_WEIGHT,
    on_progress: Progress | None = None,
    library: Library | str | Path = "adapters",
) -> Adapter:
    """Merge concepts of one method into one adapter.

    Args:
        adapters: adapters, names in the library, or paths.
        weights: one factor an adapter; None for the merge's own: 1, or 1/n for an average.
        how: one of the method's merges. "" is its default; SBoRA's is `fuse` where the base model is at hand, else
            `sum`, which is exact and needs no base model.
        base: the base model or its name, for merges that need it; None is what the concepts were trained for.
        prior_weight: how strongly `fuse` preserves the output on prompts without a concept, from 0 on.
        on_progress: called with (done, total) while the base model is sampled.

    Raises:
        SboraError: adapters of several methods or base models, an unknown merge, a base model that cannot be loaded.
    """
    if not 0 <= prior_weight < float("inf"):
        raise SboraError(f"got prior_weight={prior_weight}, expected a number from 0 on")
    adapters = load_adapters(adapters, library)
    check_mergeable([adapter.spec for adapter in adapters])
    method = find_method(adapters[0].spec.method_name)
    chosen, model = method.find_merge(how), None
    if chosen.needs_base:
        try:
            model = _load(base, adapters[0].spec, chosen, may_download=bool(how) or not chosen.fallback)
        except SboraError as reason:
            if how or base or not chosen.fallback:
                raise
            log.info("merging by %s, because %s", chosen.fallback, reason)
            chosen = method.find_merge(chosen.fallback)
    weights = list(weights) if weights else [chosen.weight(len(adapters))] * len(adapters)
    return chosen.run(MergeRequest(adapters, weights, model, prior_weight, on_progress))


def _load(base: "Base | str | None", spec: Spec, merge: Merge, may_download: bool) -> "Base":
    """Return the given base model, or else that of the adapters; may raise SboraError."""
    from sbora_diffusion.models.base import Base, load_base

    if isinstance(base, Base):
        return base
    name = base or spec.base_id
    if not (base or may_download or _is_at_hand(name)):
        raise SboraError(f"the base model {name} is not on this machine (--how fuse loads it)")
    loaded = load_base(name, "" if merge.samples else "fp32")
    if loaded.fingerprint != spec.base_fingerprint and not base:
        raise SboraError(f"the base model {name} has changed since the concepts were trained")
    return loaded


def _is_at_hand(name: str) -> bool:
    """Whether a base model is embedded, a file or folder, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    from sbora_diffusion.models.loading import EMBEDDED, INDEX, full_name

    name = full_name(name)
    if name == EMBEDDED or Path(name).exists():
        return True
    return name.count("/") == 1 and isinstance(try_to_load_from_cache(name, INDEX), str)
