"""Second moments of what the adapted layers see, summed up while the base model draws."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.inference.generate import applied
from sbora_diffusion.models.base import Base

PROMPTS = ("a photo of a {token}", "a {token} on the beach", "a {token} in the snow", "a {token} at night")
PRIOR_PROMPTS = ("a photo of a house", "a person on the beach", "a red car in the snow", "a tree at night")
STEPS = 10
GUIDANCE = 3.0
SEEDS = 2


class Moments:
    """Running E[x xᵀ] of the inputs x of layers, in float64.

    Args:
        columns: by layer, those of x that matter; None: all.
    """

    def __init__(self, columns: Mapping[str, Tensor | None]) -> None:
        self._columns = columns
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, key: str, inputs: Tensor) -> None:
        """Inputs (..., in) of the layer `key`."""
        rows, columns = inputs.detach().flatten(0, -2), self._columns[key]
        if columns is not None:
            rows = rows[:, columns.to(rows.device)]
        rows = rows.double()
        self._sums[key] = self._sums.get(key, 0) + rows.T @ rows
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def means(self) -> dict[str, Tensor]:
        """(n, n) float64 on the CPU, by "<component>.<canonical layer>"."""
        return {key: (total / self._counts[key]).cpu() for key, total in self._sums.items()}


@contextmanager
def recorded_inputs(base: Base, columns: Mapping[str, Tensor | None]) -> Iterator[Moments]:
    """The moments of everything that passes these layers of the base model meanwhile; `columns` as for `Moments`."""
    moments, hooks = Moments(columns), []

    def recorder(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: moments.add(key, inputs[0])

    try:
        for key in columns:
            hooks.append(base.layers[key].register_forward_pre_hook(recorder(key)))
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


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
