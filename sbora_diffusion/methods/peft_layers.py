"""Inject any of PEFT's tuners into chosen layers, in float32, and read low-rank factors out of them again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import canonical
from sbora_diffusion.adapters.file import Dense
from sbora_diffusion.methods.base import ADAPTER, Injected, Injection, Learned

Tuners = dict[str, dict[str, Any]]  # component -> canonical layer -> PEFT's layer


@contextmanager
def peft_layers(into: Injection, make: Callable[[list[str]], PeftConfig]) -> Iterator[Tuners]:
    """Inject an adapter whose initial values depend on the config's seed only; remove it at the end.

    Args:
        make: names of layers -> the adapter's configuration.
    """
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


def injected_tuners(tuners: Tuners, read: Callable[[Any], Dense]) -> Injected:
    """Return what was injected, given how a layer's change is read."""
    trained = {
        component: [p for tuner in found.values() for p in adapter_parameters(tuner) if p.requires_grad]
        for component, found in tuners.items()
    }

    @torch.no_grad()
    def collect() -> Learned:
        return {}, {f"{part}.{name}": read(tuner) for part, found in tuners.items() for name, tuner in found.items()}

    return Injected(trained, collect)


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
