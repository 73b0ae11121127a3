"""Mix-of-Show's gradient fusion as that paper does it, by LBFGS over whole weights: a baseline for the closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbora_diffusion.adapters.fuse import response

STEPS = {"text_encoder": 500, "text_encoder_2": 500, "unet": 50, "transformer": 50}  # of the paper's code


def gradient_fusion(
    deltas: Sequence[Tensor], moments: Sequence[Tensor], prior: Tensor, *, prior_weight: float, steps: int
) -> Tensor:
    """Minimise the layer's objective from the mean of the deltas, (out, in) in their dtype.

    Works on sums of the moments E[x xᵀ] instead of on recorded inputs x, one product an evaluation however many
    concepts there are: `fuse.objective` is tr(ΔW S ΔWᵀ) − 2 tr(ΔW Cᵀ) + const with S = Σ_j M_j + λ P and
    C = Σ_j ΔW_j M_j. So a comparison of times is fair to it.

    Args:
        deltas, moments, prior, prior_weight: as in `full_support`.
        steps: LBFGS iterations at most.
    """
    seen = torch.stack(list(moments)).sum(0) + prior_weight * prior
    wanted = torch.stack([delta @ own for delta, own in zip(deltas, moments, strict=True)]).sum(0)
    constant = torch.stack([response(delta, own) for delta, own in zip(deltas, moments, strict=True)]).sum()
    fused = torch.stack(list(deltas)).mean(0).requires_grad_()
    optimizer = torch.optim.LBFGS([fused], lr=1.0, max_iter=steps, line_search_fn="strong_wolfe")

    @torch.no_grad()
    def closure() -> Tensor:
        product = fused @ seen
        fused.grad = 2 * (product - wanted)
        return ((product - 2 * wanted) * fused).sum() + constant

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return fused.detach()
