"""A concept inside the base model while it is trained: its method's parameters and its token, removed at the end."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Dense, Factor
from sbora_diffusion.adapters.layer import SboraLayer
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.methods.base import Injected, Injection
from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.layerwise_tokens import LayerwiseEmbedding, cross_attentions, layerwise_tokens
from sbora_diffusion.models.target_modules import blocks_before, only_passed
from sbora_diffusion.models.tokens import TokenEmbedding, added_tokens, class_embedding
from sbora_diffusion.recipes.config import TrainConfig


@dataclass(frozen=True, eq=False)
class InjectedConcept:
    """The concept while it is being trained."""

    base: Base
    injected: Injected
    tokens: Mapping[str, TokenEmbedding | LayerwiseEmbedding]  # by the text encoder's component

    @property
    def layers(self) -> dict[str, dict[str, SboraLayer]]:
        """SBoRA's: component -> canonical layer -> layer; empty for other methods."""
        return self.injected.sbora

    @property
    def trained(self) -> dict[str, list[nn.Parameter]]:
        """The trained weights, by component."""
        return self.injected.trained

    @property
    def embeddings(self) -> list[nn.Parameter]:
        """The token's, one a text encoder."""
        return [embedding.learned for embedding in self.tokens.values()]

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters."""
        return [*(parameter for part in self.trained.values() for parameter in part), *self.embeddings]

    def learned(self) -> tuple[dict[str, Factor], dict[str, Dense], dict[str, Tensor]]:
        """Return what a concept file holds: factors, dense changes, and by component the token's embeddings (n, h)."""
        rows = {part: one.learned.detach().cpu().clone().flatten(0, -2) for part, one in self.tokens.items()}
        return *self.injected.collect(), rows


@contextmanager
def injected_concept(
    concept: Concept, base: Base, interval: Interval | None, config: TrainConfig
) -> Iterator[InjectedConcept]:
    """Inject the adapter, then the token (PEFT freezes everything present when it injects); remove both at the end."""
    start = class_embedding(base, concept.class_noun, config.method.token_vectors)
    with injected(base, concept.name, interval, config) as weights, _tokens(base, concept, start, config) as tokens:
        for embedding in tokens.values():
            embedding.learned.data = embedding.learned.data.float()  # of a vocabulary in half precision
        if find_method(config.method.name).fixed_noun and config.method.token_vectors > 1:
            for embedding in tokens.values():
                embedding.learned.register_hook(_without_last)
        checkpointed = _checkpointed(base) if config.model.gradient_checkpointing else nullcontext()
        with checkpointed, only_passed(base.denoiser, blocks_before(base, config.method.blocks)):
            yield InjectedConcept(base, weights, tokens)


def injected(
    base: Base, concept: str, interval: Interval | None, config: TrainConfig
) -> AbstractContextManager[Injected]:
    """Inject the parameters of the config's method, without a token; `concept` is the concept's name."""
    method = find_method(config.method.name)
    return method.inject(Injection(base, method.layers(base, config), concept, interval, config))


@contextmanager
def _checkpointed(base: Base) -> Iterator[None]:
    """Recompute the denoiser's activations in the backward pass instead of keeping them."""
    denoiser: Any = base.denoiser
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


def _tokens(
    base: Base, concept: Concept, start: Mapping[str, Tensor], config: TrainConfig
) -> AbstractContextManager[Mapping[str, TokenEmbedding | LayerwiseEmbedding]]:
    named = {f"{component}.{concept.token}": rows for component, rows in start.items()}
    if not config.method.layerwise_tokens:
        return added_tokens(base, named)
    count = len(cross_attentions(base))
    return layerwise_tokens(
        base, {key: rows.repeat(count, 1) for key, rows in named.items()}, dict.fromkeys(named, count)
    )


def _without_last(gradient: Tensor) -> Tensor:
    """Zero the gradient of the last embedding, the class noun's."""
    return torch.cat([gradient[..., :-1, :], torch.zeros_like(gradient[..., -1:, :])], dim=-2)
