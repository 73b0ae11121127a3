"""What `merge` does where the base model is needed: `--how fuse`, and every method's own merge."""

import logging
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import track
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.fuse import fuse
from sbora_diffusion.methods.calibration import SampledInputs
from sbora_diffusion.methods.merging import merge_by_method
from sbora_diffusion.models.base import load_base
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)


def fuse_on_samples(
    adapters: Sequence[Adapter], weights: Sequence[float], base_name: str, prior_weight: float
) -> Adapter:
    """The closed-form merge of concepts, on inputs that the base model sees while it draws each of them.

    Args:
        base_name: "" is what the first concept was trained for.
    """
    if not 0 <= prior_weight < float("inf"):
        raise SboraError(f"got --prior-weight {prior_weight}, expected a number from 0 on")
    inputs = SampledInputs(load_base(base_name or adapters[0].spec.base_id, ""), adapters)
    drawn = iter(
        track(range(len(adapters) + bool(prior_weight)), "drawing what to fuse for", console=Console(stderr=True))
    )

    def shown(adapter: Adapter | None, columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        next(drawn)
        return inputs(adapter, columns)

    fused = fuse(adapters, weights, shown, prior_weight=prior_weight)
    next(drawn, None)
    return fused


def merged_as_its_paper_does(
    adapters: Sequence[Adapter], weights: Sequence[float] | None, how: str, base_name: str
) -> Adapter:
    """Adapters of a method that is not SBoRA, merged by its own rule.

    Args:
        weights: None for those of the method.
        base_name: "" is what the first concept was trained for.
    """
    return merge_by_method(load_base(base_name or adapters[0].spec.base_id), adapters, weights, how)
