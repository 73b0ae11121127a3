"""SBoRA: train the columns (FA) or rows (FB) of an interval of the ledger; their sum is exact and removable."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from sbora_diffusion.adapters.basis import FORMAT, Side
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.methods.registry import (
    ADAPTER,
    Inject,
    Injected,
    Injection,
    LayerSize,
    Merge,
    MergeRequest,
    Method,
)


def injecting(side: Side) -> Inject:
    """Return the function that injects columns (fa) or rows (fb)."""

    @contextmanager
    def inject(into: Injection) -> Iterator[Injected]:
        from sbora_diffusion.adapters.inplace_training import inplace_training
        from sbora_diffusion.adapters.layer import attach
        from sbora_diffusion.methods.live import lora_config, peft_layers

        assert into.interval is not None
        models = {part: into.base.component(part) for part in into.layers}
        with peft_layers(into, lambda names: lora_config(into.rank, names)), ExitStack() as directly:
            seed = into.config.method.basis_seed
            found = {part: attach(model, ADAPTER, side, into.interval, seed) for part, model in models.items()}
            if not into.config.loss.erasure_weight:  # which reads the base weights at every step
                for model in models.values():
                    directly.enter_context(inplace_training(model, ADAPTER))
            trained = {part: [layer.trained for layer in named.values()] for part, named in found.items()}
            yield Injected(trained, lambda: (_factors(models), {}), found)

    return inject


def _factors(models: Mapping[str, nn.Module]) -> dict[str, Factor]:
    from sbora_diffusion.adapters.layer import collect

    found: dict[str, Factor] = {}
    for component, model in models.items():
        found |= collect(model, ADAPTER, component)
    return found


def layer_size(side: Side) -> LayerSize:
    """Return the function that counts what columns (fa) or rows (fb) train in a layer."""
    return lambda shape, config: config.method.rank * shape[side == "fb"]


def _sum(request: MergeRequest) -> Adapter:
    from sbora_diffusion.adapters.merge import merge

    return merge(request.adapters, request.weights, "sum")


def _fuse(request: MergeRequest) -> Adapter:
    from sbora_diffusion.adapters.fuse import fuse

    return fuse(request.adapters, request.weights, request.inputs, prior_weight=request.prior_weight)


SUM = Merge(run=_sum)
FUSE = Merge(run=_fuse, needs_base=True, samples=True, fallback="sum")


def _sbora(side: Side) -> Method:
    return Method(
        name=f"sbora-{side}",
        inject=injecting(side),
        layer_size=layer_size(side),
        merges={"fuse": FUSE, "sum": SUM},
        side=side,
        owns_interval=True,
        file_format=FORMAT,
    )


METHODS = (_sbora("fa"), _sbora("fb"))
