"""LoKr (Yeh et al. 2023, LyCORIS), PEFT's tuner: ΔW is a Kronecker product, stored as whole matrices."""

from contextlib import AbstractContextManager
from typing import Any

from sbora_diffusion.adapters.file import Dense
from sbora_diffusion.methods.lora import AVERAGE, SUM
from sbora_diffusion.methods.registry import ADAPTER, Injected, Injection, Method
from sbora_diffusion.recipes.config import TrainConfig


def inject(into: Injection) -> AbstractContextManager[Injected]:
    """Inject W1 ⊗ W2 of scale one; a W2 wider than twice the rank is a product of two factors."""
    from peft import LoKrConfig

    from sbora_diffusion.methods.live import inject_tuners

    return inject_tuners(into, lambda names: LoKrConfig(r=into.rank, alpha=into.rank, target_modules=names), _read)


def _read(tuner: Any) -> Dense:
    from sbora_diffusion.methods.live import copied

    return Dense(copied(tuner.get_delta_weight(ADAPTER)))


def _size(shape: tuple[int, int], config: TrainConfig) -> int:
    from peft.tuners.lokr.layer import factorization

    (small_out, large_out), (small_in, large_in) = map(factorization, shape)
    rank = config.method.rank
    is_factored = rank < max(large_out, large_in) / 2
    return small_out * small_in + (rank * (large_out + large_in) if is_factored else large_out * large_in)


METHODS = (
    Method(
        name="lokr",
        inject=inject,
        layer_size=_size,
        merges={"average": AVERAGE, "sum": SUM},
        reads_weights=True,  # PEFT reshapes ΔW like the weight, which nf4 packs and sharding splits
    ),
)
