"""A base model's frozen weights in shares, one a process (PyTorch's FSDP2): a block is whole only while it computes.

Adapters and tokens are put in afterwards and are whole in every process, as are the autoencoder and the text encoders
that learn tokens. So nothing of a training has to know of it, but what reads a weight by itself (adapter/whole.py).
"""

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from sbora_diffusion.models.blocks import repeated_blocks


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
