"""Second moments of the layers' inputs, as `fuse` takes them, sampled once for each concept of a study."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.methods.calibration import SampledInputs
from sbora_diffusion.models.base import Base


class CachedInputs:
    """The inputs of all columns, kept for each concept, from which merges take those of their columns."""

    def __init__(self, base: Base, adapters: Sequence[Adapter]) -> None:
        self._sample = SampledInputs(base, adapters)
        self._columns = {key: torch.arange(shape[1]) for key, shape in base.layer_shapes.items()}
        self._moments: dict[str | None, dict[str, Tensor]] = {}

    def moments(self, adapter: Adapter | None) -> dict[str, Tensor]:
        """Return the moments of all columns, in float64; None: of the prior prompts."""
        name = adapter.spec.name if adapter else None
        if name not in self._moments:
            self._moments[name] = self._sample(adapter, self._columns)
        return self._moments[name]

    def __call__(self, adapter: Adapter | None, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the moments of some columns, as `fuse.Inputs` does."""
        moments = self.moments(adapter)
        return {key: moments[key][index][:, index] for key, index in columns.items()}
