"""What merges measure: second moments of the adapted layers' inputs, and text states, while concepts are sampled."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.latents import recorded_inputs
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.models.base import Base

PROMPTS = ("a photo of a {token}", "a {token} on the beach", "a {token} in the snow", "a {token} at night")
PRIOR_PROMPTS = ("a photo of a house", "a person on the beach", "a red car in the snow", "a tree at night")
STEPS = 10
GUIDANCE = 3.0
SEEDS = 2


class SampledInputs:
    """The `inputs` of `fuse`: moments while each concept's own model samples it, and of the prior prompts.

    The prompts are those of the adapter's training (the preview and prior prompts in its file), or PROMPTS and
    PRIOR_PROMPTS. `on_progress` is called with (done, total) after the samples of each concept and of the prior.
    """

    def __init__(
        self,
        base: Base,
        adapters: Sequence[Adapter],
        steps: int = STEPS,
        seeds: int = SEEDS,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._base, self._steps, self._seeds = base, steps, seeds
        self._prior = prior_prompts(adapters)
        guidance = adapters[0].spec.recipe.get("guidance")
        self._guidance = float(guidance) if isinstance(guidance, (int, float)) else GUIDANCE
        self._done, self._total, self._on_progress = 0, len(adapters) + 1, on_progress

    def __call__(self, adapter: Adapter | None, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return moments as `fuse.Inputs` does."""
        prompts = self._prior if adapter is None else own_prompts(adapter)
        own = [] if adapter is None else [adapter]
        with applied(self._base, own), recorded_inputs(self._base, columns) as moments:
            self._sample(prompts)
        self._done += 1
        if self._on_progress:
            self._on_progress(self._done, self._total)
        return moments.means()

    @torch.no_grad()
    def _sample(self, prompts: Sequence[str]) -> None:
        for seed in range(self._seeds):
            seeds = [seed] * len(prompts)
            self._base.sample(prompts, seeds=seeds, steps=self._steps, guidance=self._guidance, as_latents=True)


@torch.no_grad()
def word_states(base: Base, adapter: Adapter) -> Tensor:
    """Return the text encoder's states (n, d) at the concept's own words, in the prompts of its training."""
    with applied(base, [adapter]):
        ids = base.tokenize(own_prompts(adapter))
        states = base.encode_text(ids).states
    own = base.family.split(base.pipeline, ids)[0]
    return states[own >= base.pipeline.text_encoder.config.vocab_size].cpu()


@torch.no_grad()
def prior_states(base: Base, adapters: Sequence[Adapter]) -> Tensor:
    """Return E[c cᵀ] (d, d) of the text encoder's states of the prior prompts."""
    states = base.encode_text(base.tokenize(prior_prompts(adapters))).states.flatten(0, 1).double().cpu()
    return states.T @ states / len(states)


def own_prompts(adapter: Adapter) -> list[str]:
    """Return prompts that name an adapter's tokens one by one; PRIOR_PROMPTS if it has no token, as it acts on any."""
    templates = _texts(adapter, "preview_prompts") or PROMPTS
    named = [template.replace("{token}", token) for token in adapter.spec.tokens for template in templates]
    return named or list(PRIOR_PROMPTS)


def prior_prompts(adapters: Sequence[Adapter]) -> list[str]:
    """Return the prior prompts of all trainings, each once, in alphabetical order."""
    return sorted({prompt for adapter in adapters for prompt in _texts(adapter, "prior_prompts") or PRIOR_PROMPTS})


def _texts(adapter: Adapter, key: str) -> list[str]:
    """Return a list of texts from the recipe of a file of any origin; empty if there is none."""
    found = adapter.spec.recipe.get(key)
    return [text for text in found if isinstance(text, str)] if isinstance(found, (list, tuple)) else []
