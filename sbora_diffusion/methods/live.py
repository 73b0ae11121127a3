"""A concept inside the base model while it is trained: its method's parameters and its token.

Methods inject any of PEFT's tuners by `peft_layers`, in float32. Everything is removed at the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Interval, canonical
from sbora_diffusion.adapters.file import Dense, Factor
from sbora_diffusion.adapters.layer import SboraLayer
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.methods.registry import ADAPTER, Injected, Injection, Learned, find_method
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.tokens import added_tokens, class_embedding
from sbora_diffusion.recipes.config import TrainConfig


@dataclass(frozen=True, eq=False)
class InjectedConcept:
    """The concept while it is being trained."""

    base: Base
    injected: Injected
    tokens: Mapping[str, Any]  # the text encoder's component -> its TokenEmbedding or LayerwiseEmbedding

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
) -> AbstractContextManager[Mapping[str, Any]]:
    named = {f"{component}.{concept.token}": rows for component, rows in start.items()}
    if not config.method.layerwise_tokens:
        return added_tokens(base, named)
    from sbora_diffusion.models.layerwise_tokens import layerwise_tokens

    return layerwise_tokens(base, named, dict.fromkeys(named, 0))


def _without_last(gradient: Tensor) -> Tensor:
    """Zero the gradient of the last embedding, the class noun's."""
    return torch.cat([gradient[..., :-1, :], torch.zeros_like(gradient[..., -1:, :])], dim=-2)


def blocks_before(base: "Base", blocks: Sequence[str]) -> list[str]:
    """Return the names of a U-Net's blocks that its forward pass computes before the first of `blocks`."""
    if base.family.denoiser != "unet" or not blocks:
        return []
    return unet_blocks_before(base.denoiser, base.adapted_layers(blocks)["unet"])


def unet_blocks_before(unet: Any, layers: Sequence[str]) -> list[str]:
    """Return the names of the blocks that a U-Net computes before the first one with one of these layers."""
    down, up = ([f"{part}.{n}" for n in range(len(getattr(unet, part)))] for part in ("down_blocks", "up_blocks"))
    middle = [] if unet.mid_block is None else ["mid_block"]
    return list(takewhile(lambda name: not any(layer.startswith(f"{name}.") for layer in layers), down + middle + up))


@contextmanager
def only_passed(denoiser: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Cut the gradient at the inputs of these blocks inside the context: they need no activations and no backward pass.

    The concept's token learns from the other blocks only.
    """
    with ExitStack() as stack:
        for name in blocks:
            hook = denoiser.get_submodule(name).register_forward_pre_hook(_detach_inputs, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _detach_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(detached, args)), {key: detached(value) for key, value in kwargs.items()}


Tuners = dict[str, dict[str, Any]]  # component -> canonical layer -> PEFT's layer


@contextmanager
def peft_layers(into: Injection, make: Callable[[list[str]], PeftConfig]) -> Iterator[Tuners]:
    """Inject an adapter whose initial values depend on the config's seed only inside the context."""
    found: Tuners = {}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(into.config.seed)
            for component, names in into.layers.items():
                model: Any = into.base.component(component)
                model.add_adapter(make(list(names)), adapter_name=ADAPTER)
                tuners = {canonical(n): m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
                for parameter in (p for tuner in tuners.values() for p in adapter_parameters(tuner)):
                    parameter.data = parameter.data.float()  # PEFT creates it in the frozen weight's dtype
                found[component] = tuners
        yield found
    finally:
        into.base.pipeline.unload_lora_weights()  # any tuner's


def adapter_parameters(tuner: Any) -> list[nn.Parameter]:
    """Return the parameters that PEFT added to a layer."""
    return [parameter for key, parameter in tuner.named_parameters() if not key.startswith("base_layer.")]


@contextmanager
def inject_tuners(
    into: Injection,
    make: Callable[[list[str]], PeftConfig],
    read: Callable[[Any], Dense],
    prepare: Callable[[str, Any], None] = lambda *_: None,
) -> Iterator[Injected]:
    """Inject one of PEFT's tuners inside the context.

    Args:
        make: names of layers -> PEFT's configuration.
        read: a layer of PEFT's -> what it adds to the weight.
        prepare: called with "<component>.<canonical layer>" and PEFT's layer after it was injected.
    """
    with peft_layers(into, make) as tuners:
        found = {f"{part}.{name}": tuner for part, named in tuners.items() for name, tuner in named.items()}
        for key, tuner in found.items():
            prepare(key, tuner)
        trained = {
            component: [p for tuner in named.values() for p in adapter_parameters(tuner) if p.requires_grad]
            for component, named in tuners.items()
        }

        @torch.no_grad()
        def collect() -> Learned:
            return {}, {key: read(tuner) for key, tuner in found.items()}

        yield Injected(trained, collect)


def lora_config(rank: int, targets: list[str], **options: Any) -> LoraConfig:
    """Return the configuration of a LoRA of scale one."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=True, **options)


def read_lora(tuner: LoraLayer) -> Dense:
    """Read a LoRA's factors, and DoRA's magnitude if there is one."""
    up: Any = tuner.lora_B[ADAPTER]
    down: Any = tuner.lora_A[ADAPTER]
    dora: Any = tuner.lora_magnitude_vector
    magnitude = copied(dora[ADAPTER].weight.unsqueeze(1)) if ADAPTER in dora else None
    return Dense(copied(up.weight * tuner.scaling[ADAPTER]), copied(down.weight), magnitude)


def copied(tensor: Tensor) -> Tensor:
    """Return a float32 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float32).clone()
