"""OFT (Qiu et al. 2023), PEFT's tuner: rotate each layer's input by a block-diagonal orthogonal matrix.

`rank` is the size of the blocks. A concept file holds ΔW = W Rᵀ − W, whole matrices, so that concepts can be summed.
"""

from contextlib import AbstractContextManager
from typing import Any

from sbora_diffusion.adapters.file import Dense
from sbora_diffusion.methods.lora import AVERAGE, SUM
from sbora_diffusion.methods.registry import ADAPTER, Injected, Injection, Method
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError


def inject(into: Injection) -> AbstractContextManager[Injected]:
    """Inject a rotation of every layer's input, by the exact Cayley transform."""
    from peft import OFTConfig

    from sbora_diffusion.methods.live import inject_tuners

    widths = {into.base.layer_shapes[f"{part}.{name}"][1] for part, names in into.layers.items() for name in names}
    if wrong := sorted(width for width in widths if width % into.rank):
        raise SboraError(
            f"got rank={into.rank}, but OFT's blocks must divide the width of every layer, such as {wrong[0]}",
            "--set rank=8",
        )

    def make(names: list[str]) -> OFTConfig:
        return OFTConfig(oft_block_size=into.rank, target_modules=names, use_cayley_neumann=False)

    return inject_tuners(into, make, _read)


def _read(tuner: Any) -> Dense:
    weight = tuner.get_base_layer().weight.detach().double()
    rotation = tuner.oft_R[ADAPTER].get_weight().double()  # (in, in)
    return Dense((weight @ rotation.T - weight).float().cpu())


def _accepts(config: TrainConfig) -> None:
    if config.method.rank == 1:
        raise SboraError("got rank=1: a block of size 1 does not rotate anything", "--set rank=8")


def _size(shape: tuple[int, int], config: TrainConfig) -> int:
    """Count a skew-symmetric matrix a block: in / r blocks of r (r - 1) / 2 parameters."""
    return shape[1] * (config.method.rank - 1) // 2


METHODS = (
    Method(
        name="oft",
        inject=inject,
        layer_size=_size,
        merges={"average": AVERAGE, "sum": SUM},
        reads_weights=True,
        accepts=_accepts,
    ),
)
