"""A concept inside the base model while it is trained: an adapter in every layer, a token, and nothing left behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sbora_diffusion.adapter.basis import Interval
from sbora_diffusion.adapter.layer import SboraLayer, attach
from sbora_diffusion.diffusion.base import TARGETS, Base
from sbora_diffusion.diffusion.concept import Concept
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.tokens import TokenEmbedding, added_tokens, class_embedding
from sbora_diffusion.methods import lora_config, method_side

ADAPTER = "concept"  # its name inside PEFT


@dataclass(frozen=True, eq=False)
class Live:
    """The concept while it is being trained."""

    layers: dict[str, dict[str, SboraLayer]]  # component -> canonical layer -> layer
    embedding: TokenEmbedding

    def parameters(self) -> list[nn.Parameter]:
        trained = [layer.trained for layers in self.layers.values() for layer in layers.values()]
        return [*trained, self.embedding.learned]


@contextmanager
def live_concept(concept: Concept, base: Base, interval: Interval, config: TrainConfig) -> Iterator[Live]:
    """Inject the adapter, then the token (PEFT freezes all that is there when it injects); take both out at the end."""
    start = class_embedding(base, concept.class_noun, config.token_vectors)
    try:
        layers = {}
        for component, targets in TARGETS.items():
            model: Any = base.component(component)
            model.add_adapter(lora_config(config.rank, targets), adapter_name=ADAPTER)
            layers[component] = attach(model, ADAPTER, method_side(config.method), interval, config.basis_seed)
        with added_tokens(base, {concept.token: start}) as embedding:
            yield Live(layers, embedding)
    finally:
        base.pipeline.unload_lora_weights()
