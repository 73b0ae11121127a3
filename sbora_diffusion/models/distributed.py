"""One training in several processes, as torchrun and `accelerate launch` start them.

Every process samples the whole batch, takes its own part and learns from the mean of all gradients: the result is that
of one process with the whole batch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from sbora_diffusion.models.families.base import repeated_blocks
from sbora_diffusion.utils.errors import SboraError

PATIENCE = timedelta(hours=2)  # for the main process to download a base model
REFUSED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "FSDP_OFFLOAD_PARAMS")

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of a training; `sharded`: each keeps a shard of the frozen weights only."""

    index: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the main process, which writes files and logs."""
        return self.index == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of a whole batch: (count · n, …) to (n, …)."""
        return rows.tensor_split(self.count)[self.index]

    @torch.no_grad()
    def average(self, parameters: Iterable[Tensor], value: float) -> float:
        """Average gradients, and a value, over all processes; return the value's mean.

        A missing gradient counts as 0, unless all processes lack it.
        """
        if self.count == 1:
            return value
        trained = list(parameters)
        here = torch.tensor([parameter.grad is not None for parameter in trained] + [value]).to(trained[0])
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained]
        flat = torch.cat([*parts, here])
        with _clear_errors():
            distributed.all_reduce(flat)
        *means, extra = (flat / self.count).split([*(parameter.numel() for parameter in trained), len(here)])
        for parameter, mean, is_there in zip(trained, means, extra[:-1] > 0, strict=True):
            parameter.grad = mean.view_as(parameter) if is_there else None
        return extra[-1].item()

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Return what the main process makes, in every process; its exceptions end the others as well."""
        if self.count == 1:
            return make()
        made = [make() if self.is_first else None]
        with _clear_errors():
            distributed.broadcast_object_list(made)
        return made[0]  # type: ignore[return-value]

    def sequentially(self, make: Callable[[], T]) -> T:
        """Let the processes make their results one after the other, and return this one's."""
        made = []
        for turn in range(self.count):
            if turn == self.index:
                made.append(make())
            with _clear_errors():
                distributed.barrier()
        return made[0]


SINGLE_PROCESS = Processes()


def num_launched() -> int:
    """Return how many processes torchrun or `accelerate launch` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def current() -> Processes:
    """Return this process among those of torch's process group, if there is one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return SINGLE_PROCESS
    return Processes(distributed.get_rank(), distributed.get_world_size(), _is_set("ACCELERATE_USE_FSDP"))


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the launched processes into one group inside the context, each on the GPU of its number if there are any.

    Raises:
        SboraError: an unsupported way of sharding, more processes than GPUs.
    """
    if num_launched() == 1 or distributed.is_initialized():
        yield current()
        return
    if refused := [name for name in REFUSED if _is_set(name)]:
        raise SboraError(
            f"got {refused[0]}, but models are sharded by FSDP only, and nothing is offloaded",
            "accelerate launch --use_fsdp, or --multi_gpu for the full model in every process",
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
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SboraError("another process of this training has ended", "its message says why") from error


def shard(model: Any) -> None:
    """Shard the weights of a model of diffusers or transformers, on this process's GPU; call it in every process.

    Its repeated blocks are gathered one at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (distributed.get_world_size(),))
    model.to(memory_format=torch.contiguous_format)  # FSDP requires it
    for module in reversed(repeated_blocks(model).values()):  # inner ones first
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
