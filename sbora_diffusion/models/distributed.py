"""One training in several processes, as torchrun and `accelerate launch` start them: who takes what, and who writes.

Every process draws the batch of all, takes its own share of it, and learns from the mean of all gradients: what is
learned is what one process would learn from the whole batch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from sbora_diffusion.models.target_modules import repeated_blocks
from sbora_diffusion.utils.errors import SboraError

PATIENCE = timedelta(hours=2)  # while the first process fetches a base model, the others wait
REFUSED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "FSDP_OFFLOAD_PARAMS")

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of a training."""

    index: int = 0
    count: int = 1
    sharded: bool = False  # whether each of them is to keep a share of the frozen weights only

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and logs."""
        return self.index == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of what was drawn for all: (count · n, …) to (n, …)."""
        return rows.tensor_split(self.count)[self.index]

    @torch.no_grad()
    def average(self, parameters: Iterable[Tensor], value: float) -> float:
        """Make gradients the mean over all processes; the mean of a number besides.

        A parameter that some processes have no gradient of counts as 0 there; one without any stays without.
        """
        if self.count == 1:
            return value
        trained = list(parameters)
        here = torch.tensor([parameter.grad is not None for parameter in trained] + [value]).to(trained[0])
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained]
        flat = torch.cat([*parts, here])
        with _others_there():
            distributed.all_reduce(flat)
        *means, extra = (flat / self.count).split([*(parameter.numel() for parameter in trained), len(here)])
        for parameter, mean, is_there in zip(trained, means, extra[:-1] > 0, strict=True):
            parameter.grad = mean.view_as(parameter) if is_there else None
        return extra[-1].item()

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """What the first process makes, in every process; whatever it raises ends the others as well."""
        if self.count == 1:
            return make()
        made = [make() if self.is_first else None]
        with _others_there():
            distributed.broadcast_object_list(made)
        return made[0]  # type: ignore[return-value]

    def sequentially(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, one after the other."""
        made = []
        for turn in range(self.count):
            if turn == self.index:
                made.append(make())
            with _others_there():
                distributed.barrier()
        return made[0]


SINGLE_PROCESS = Processes()


def num_launched() -> int:
    """How many processes torchrun or `accelerate launch` has started for one training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def current() -> Processes:
    """All by itself, unless `joined` or somebody else has brought several together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return SINGLE_PROCESS
    return Processes(distributed.get_rank(), distributed.get_world_size(), _is_said("ACCELERATE_USE_FSDP"))


def _is_said(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


@contextmanager
def joined() -> Iterator[Processes]:
    """Meanwhile the launched processes work together, each on the GPU of its number if there are any.

    Raises:
        SboraError: started to shard the model, more processes than GPUs.
    """
    if num_launched() == 1 or distributed.is_initialized():
        yield current()
        return
    if refused := [name for name in REFUSED if _is_said(name)]:
        raise SboraError(
            f"got {refused[0]}, but models are sharded by FSDP alone, and nothing is offloaded",
            "accelerate launch --use_fsdp, or --multi_gpu for the whole model in every process",
        )
    if torch.cuda.is_available():
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise SboraError(f"process {place + 1} of this machine finds no GPU, there are {there}", "start fewer")
        torch.cuda.set_device(place)
    distributed.init_process_group(timeout=PATIENCE)
    try:
        yield current()
    finally:
        distributed.destroy_process_group()


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SboraError("another process of this training has ended", "its message says why") from error


def shard(model: Any) -> None:
    """Keep this process's share of a model's weights, on its GPU if there is one; every process calls this alike.

    Args:
        model: of diffusers or transformers, with the same weights in every process; its repeated blocks are put
            together one at a time.
    """
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (distributed.get_world_size(),))
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    for module in reversed(repeated_blocks(model).values()):  # inner ones first
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
