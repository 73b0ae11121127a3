"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), merged by federated averaging or by sum."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sbora_diffusion.adapters.baseline_merges import weighted_sum
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.methods.base import Inject, Injected, Injection, Merge, MergeRequest, Method
from sbora_diffusion.recipes.config import TrainConfig

DORA = {"use_dora": True}


def injecting(**options: Any) -> Inject:
    """Return the function that injects a LoRA with these options of PEFT's LoraConfig."""

    @contextmanager
    def inject(into: Injection) -> Iterator[Injected]:
        from sbora_diffusion.methods.peft_layers import injected_tuners, lora_config, peft_layers, read_lora

        with peft_layers(into, lambda names: lora_config(into.rank, names, **options)) as tuners:
            yield injected_tuners(tuners, read_lora)

    return inject


def lora_size(shape: tuple[int, int], config: TrainConfig) -> int:
    """Count the parameters of both factors in a layer of shape (out, in)."""
    return config.method.rank * sum(shape)


def _dora_size(shape: tuple[int, int], config: TrainConfig) -> int:
    return lora_size(shape, config) + shape[0]


def _sum(request: MergeRequest) -> Adapter:
    layers = request.base.layers if request.base else {}
    return weighted_sum(request.adapters, request.weights, layers, "sum")


def _average(request: MergeRequest) -> Adapter:
    layers = request.base.layers if request.base else {}
    return weighted_sum(request.adapters, request.weights, layers, "average")


SUM, AVERAGE = Merge(run=_sum), Merge(run=_average, weight=lambda count: 1 / count)

METHODS = (
    Method(name="lora", inject=injecting(), layer_size=lora_size, merges={"average": AVERAGE, "sum": SUM}),
    Method(
        name="dora",
        inject=injecting(**DORA),
        layer_size=_dora_size,
        merges={
            "average": Merge(run=_average, weight=AVERAGE.weight, needs_base=True),
            "sum": Merge(run=_sum, needs_base=True),
        },
        reads_weights=True,
        peft_options=DORA,
    ),
)
