"""Second moments of what the adapted layers see, summed up while the base model draws."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.input_moments import recorded_inputs

PROMPTS = ("a photo of a {token}", "a {token} on the beach", "a {token} in the snow", "a {token} at night")
PRIOR_PROMPTS = ("a photo of a house", "a person on the beach", "a red car in the snow", "a tree at night")
STEPS = 10
GUIDANCE = 3.0
SEEDS = 2


class SampledInputs:
    """What `fuse` asks for: moments of each concept's inputs while its own model draws it, and of the prior prompts'.

    The prompts are those of the adapter's training (its preview and prior prompts, which stand in its file), or PROMPTS
    and PRIOR_PROMPTS.
    """

    def __init__(self, base: Base, adapters: Sequence[Adapter], steps: int = STEPS, seeds: int = SEEDS) -> None:
        self._base, self._steps, self._seeds = base, steps, seeds
        self._prior = prior_prompts(adapters)
        guidance = adapters[0].spec.recipe.get("guidance")
        self._guidance = float(guidance) if isinstance(guidance, (int, float)) else GUIDANCE

    def __call__(self, adapter: Adapter | None, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `fuse.Inputs`."""
        prompts = self._prior if adapter is None else own_prompts(adapter)
        own = [] if adapter is None else [adapter]
        with applied(self._base, own), recorded_inputs(self._base, columns) as moments:
            self._draw(prompts)
        return moments.means()

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str]) -> None:
        for seed in range(self._seeds):
            seeds = [seed] * len(prompts)
            self._base.sample(prompts, seeds=seeds, steps=self._steps, guidance=self._guidance, as_latents=True)


def own_prompts(adapter: Adapter) -> list[str]:
    """Prompts that name an adapter's tokens, one after the other; PRIOR_PROMPTS if it has none, for it acts on any."""
    templates = _texts(adapter, "preview_prompts") or PROMPTS
    named = [template.replace("{token}", token) for token in adapter.spec.tokens for template in templates]
    return named or list(PRIOR_PROMPTS)


def prior_prompts(adapters: Sequence[Adapter]) -> list[str]:
    """Those of all trainings, each once, in alphabetical order."""
    return sorted({prompt for adapter in adapters for prompt in _texts(adapter, "prior_prompts") or PRIOR_PROMPTS})


def _texts(adapter: Adapter, key: str) -> list[str]:
    """A list of texts in the recipe of a file that may come from anywhere; empty if there is none."""
    said = adapter.spec.recipe.get(key)
    return [text for text in said if isinstance(text, str)] if isinstance(said, (list, tuple)) else []
