"""What each method puts into the base model to be trained, and how it is read out again."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sbora_diffusion.adapters.basis import Interval, canonical
from sbora_diffusion.adapters.dense import Dense
from sbora_diffusion.adapters.inplace_training import inplace_training
from sbora_diffusion.adapters.layer import SboraLayer, attach
from sbora_diffusion.methods.registry import find_method, lora_config, method_side
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.target_modules import adapted_layers
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError

ADAPTER = "concept"  # its name inside PEFT
CUSTOM_DIFFUSION = (".attn2.to_k", ".attn2.to_v")


@dataclass(frozen=True, eq=False)
class Injected:
    """Trained parameters by component; `dense` reads what other methods than SBoRA have learned."""

    trained: dict[str, list[nn.Parameter]]
    sbora: dict[str, dict[str, SboraLayer]] = field(default_factory=dict)  # component -> canonical layer -> layer
    dense: Callable[[], dict[str, Dense]] = dict



def _adapted_layers(base: Base, config: TrainConfig) -> dict[str, list[str]]:
    return adapted_layers(base, config.method.blocks, text_encoders=config.optim.text_encoder_learning_rate > 0)


@contextmanager
def injected(base: Base, name: str, interval: Interval | None, config: TrainConfig) -> Iterator[Injected]:
    """Put a method's parameters into the base model, changing nothing yet; take them out at the end.

    Args:
        name: the concept's, which chooses Orthogonal Adaptation's columns.
    """
    kind = find_method(config.method.name).kind
    if kind in ("fa", "fb"):
        assert interval is not None
        with _sbora(base, interval, config) as found:
            yield found
    elif kind == "full":
        with _whole(base, config) as found:
            yield found
    elif kind == "none":
        yield Injected({})
    else:
        with _low_rank(base, name, config) as found:
            yield found


@contextmanager
def _sbora(base: Base, interval: Interval, config: TrainConfig) -> Iterator[Injected]:
    layers: dict[str, dict[str, SboraLayer]] = {}
    try:
        for component, targets in _adapted_layers(base, config).items():
            model: Any = base.component(component)
            model.add_adapter(lora_config(config.method.rank, targets), adapter_name=ADAPTER)
            _to_fp32(model)
            layers[component] = attach(
                model, ADAPTER, method_side(config.method.name), interval, config.method.basis_seed
            )
        trained = {part: [layer.trained for layer in found.values()] for part, found in layers.items()}
        with ExitStack() as directly:
            if not config.loss.erasure_weight:  # which reads the base weights at every step
                for component in layers:
                    directly.enter_context(inplace_training(base.component(component), ADAPTER))
            yield Injected(trained, layers)
    finally:
        base.pipeline.unload_lora_weights()


@contextmanager
def _low_rank(base: Base, name: str, config: TrainConfig) -> Iterator[Injected]:
    kind = find_method(config.method.name).kind
    found: dict[str, dict[str, LoraLayer]] = {}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # of the Kaiming factor
            for component, targets in _adapted_layers(base, config).items():
                model: Any = base.component(component)
                model.add_adapter(lora_config(config.method.rank, targets, kind == "dora"), adapter_name=ADAPTER)
                _to_fp32(model)
                found[component] = {canonical(n): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        if kind == "orthogonal":
            for component, layers in found.items():
                for layer, module in layers.items():
                    _set_basis(module, f"{name}/{config.seed}/{component}.{layer}", config)
        trained = {
            component: [p for module in layers.values() for p in _own(module) if p.requires_grad]
            for component, layers in found.items()
        }
        yield Injected(trained, dense=lambda: _read(found))
    finally:
        base.pipeline.unload_lora_weights()


def _to_fp32(model: nn.Module) -> None:
    """Keep in fp32 what PEFT has made in the dtype of frozen weights."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for parameter in _own(module):
                parameter.data = parameter.data.float()


def _own(module: Any) -> list[nn.Parameter]:
    """A layer's adapter: A, B and DoRA's magnitude."""
    return [p for key, p in module.named_parameters() if key.split(".")[0].startswith("lora_")]


@torch.no_grad()
def _set_basis(module: LoraLayer, key: str, config: TrainConfig) -> None:
    """A = r rows, chosen by chance, of the orthogonal matrix that all layers of this input width share; frozen."""
    down: Any = module.lora_A[ADAPTER]
    width = down.weight.shape[1]
    if config.method.rank > width:
        raise SboraError(f"got rank={config.method.rank}, but a layer has {width} inputs, and no more orthogonal rows")
    seed = int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "little")
    rows = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[: config.method.rank]
    down.weight.copy_(orthogonal_matrix(width, config.method.basis_seed)[rows])
    down.weight.requires_grad_(False)


@cache
def orthogonal_matrix(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix (width, width) float32, the same for every concept of a seed."""
    generator = torch.Generator().manual_seed(seed * 100_003 + width)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.float()


@torch.no_grad()
def _read(found: dict[str, dict[str, LoraLayer]]) -> dict[str, Dense]:
    result = {}
    for component, layers in found.items():
        for name, module in layers.items():
            up: Any = module.lora_B[ADAPTER]
            down: Any = module.lora_A[ADAPTER]
            weights = (up.weight * module.scaling[ADAPTER], down.weight)
            dora: Any = module.lora_magnitude_vector
            magnitude = dora[ADAPTER].weight.unsqueeze(1) if ADAPTER in dora else None
            copied = [None if w is None else w.detach().to("cpu", torch.float32).clone() for w in (*weights, magnitude)]
            assert copied[0] is not None
            result[f"{component}.{name}"] = Dense(copied[0], copied[1], copied[2])
    return result


class _Added(nn.Module):
    """W + ΔW."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


@contextmanager
def _whole(base: Base, config: TrainConfig) -> Iterator[Injected]:
    """ΔW of every cross-attention's keys and values, as Custom Diffusion (Kumari et al. 2023, section 3.1) trains."""
    if base.family.denoiser != "unet":
        raise SboraError(
            "custom-diffusion trains a U-Net's cross-attention, which this base model has not",
            "choose another --method",
        )
    names = [f"unet.{name}" for name in _adapted_layers(base, config)["unet"] if name.endswith(CUSTOM_DIFFUSION)]
    layers = {name: base.layers[name] for name in names}
    added = {key: _Added(layer.weight) for key, layer in layers.items()}

    def read() -> dict[str, Dense]:
        return {key: Dense(each.delta.detach().to("cpu", torch.float32).clone()) for key, each in added.items()}

    try:
        for key, layer in layers.items():
            parametrize.register_parametrization(layer, "weight", added[key], unsafe=True)  # half weights, fp32 change
        yield Injected({"unet": [each.delta for each in added.values()]}, dense=read)
    finally:
        for layer in layers.values():
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
