"""Mix-of-Show (Gu et al. 2023): ED-LoRA, merged by gradient fusion over whole weights."""

import torch

from sbora_diffusion.adapters.baseline_merges import fuse_by_gradient
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.methods.lora import AVERAGE, SUM, injecting, lora_size
from sbora_diffusion.methods.registry import Merge, MergeRequest, Method


def _fuse_by_gradient(request: MergeRequest) -> Adapter:
    base = request.model
    columns = {key: torch.arange(in_dim) for key, (_, in_dim) in base.layer_shapes.items()}
    moments = [request.inputs(adapter, columns) for adapter in request.adapters]
    return fuse_by_gradient(request.adapters, request.weights, moments, base.device)


METHODS = (
    Method(
        name="mix-of-show",
        inject=injecting(),
        layer_size=lora_size,
        merges={
            "gradient": Merge(run=_fuse_by_gradient, needs_base=True, samples=True),
            "average": AVERAGE,
            "sum": SUM,
        },
    ),
)
