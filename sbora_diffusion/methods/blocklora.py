"""BlockLoRA (arXiv 2503.08575): disjoint rows, and randomised output erasure as a loss."""

from sbora_diffusion.methods.registry import Method
from sbora_diffusion.methods.sbora import SUM, injecting, layer_size

METHODS = (
    Method(
        name="blocklora",
        inject=injecting("fb"),
        layer_size=layer_size("fb"),
        merges={"sum": SUM},
        side="fb",
        owns_interval=True,
    ),
)
