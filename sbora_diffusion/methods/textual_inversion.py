"""Textual inversion (Gal et al. 2023) and, with layerwise tokens, P+ (Voynov et al. 2023): embeddings, no weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import in_order, put_together
from sbora_diffusion.methods.registry import Injected, Injection, Merge, MergeRequest, Method
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError


@contextmanager
def inject(_: Injection) -> Iterator[Injected]:
    """Inject nothing: the token is added by `live.injected_concept`."""
    yield Injected({}, lambda: ({}, {}))


def _accepts(config: TrainConfig) -> None:
    if config.method.blocks:
        raise SboraError("blocks selects the layers to adapt, textual-inversion adapts none", "--set blocks=")
    if not config.optim.token_learning_rate:
        raise SboraError("got token_learning_rate=0: textual-inversion would learn nothing", "leave it out")


def _merge_tokens(request: MergeRequest) -> Adapter:
    adapters, weights = in_order(request.adapters, request.weights)
    return put_together(adapters, weights, {}, {"how": "tokens"})


METHODS = (
    Method(
        name="textual-inversion",
        inject=inject,
        layer_size=lambda _, __: 0,
        merges={"tokens": Merge(run=_merge_tokens)},
        adapts=lambda _: False,
        accepts=_accepts,
    ),
)
