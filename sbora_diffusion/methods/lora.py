"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), merged by federated averaging or by sum."""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from sbora_diffusion.adapters.baseline_merges import weighted_sum
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.methods.registry import Inject, Injected, Injection, Merge, MergeRequest, Method
from sbora_diffusion.recipes.config import TrainConfig

DORA = {"use_dora": True}


def injecting(**options: Any) -> Inject:
    """Return the function that injects a LoRA with these options of PEFT's LoraConfig."""

    def inject(into: Injection) -> AbstractContextManager[Injected]:
        from sbora_diffusion.methods.live import inject_tuners, lora_config, read_lora

        return inject_tuners(into, lambda names: lora_config(into.rank, names, **options), read_lora)

    return inject


def lora_size(shape: tuple[int, int], config: TrainConfig) -> int:
    """Count the parameters of both factors in a layer of shape (out, in)."""
    return config.method.rank * sum(shape)


def _merge(how: str, request: MergeRequest) -> Adapter:
    return weighted_sum(request.adapters, request.weights, request.base.layers if request.base else {}, how)


SUM = Merge(run=partial(_merge, "sum"))
AVERAGE = Merge(run=partial(_merge, "average"), weight=lambda count: 1 / count)

METHODS = (
    Method(name="lora", inject=injecting(), layer_size=lora_size, merges={"average": AVERAGE, "sum": SUM}),
    Method(
        name="dora",
        inject=injecting(**DORA),
        layer_size=lambda shape, config: lora_size(shape, config) + shape[0],
        merges={"average": replace(AVERAGE, needs_base=True), "sum": replace(SUM, needs_base=True)},
        reads_weights=True,
        peft_options=DORA,
    ),
)
