"""Mix-of-Show's gradient fusion as that paper does it, by LBFGS over whole weights: a baseline for the closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbora_diffusion.adapter.fuse import objective

STEPS = {"text_encoder": 500, "text_encoder_2": 500, "unet": 50, "transformer": 50}  # of the paper's code


def gradient_fusion(
    deltas: Sequence[Tensor], moments: Sequence[Tensor], prior: Tensor, *, prior_weight: float, steps: int
) -> Tensor:
    """Minimise the layer's objective from the mean of the deltas, (out, in) in their dtype.

    Works on the moments E[x xᵀ] instead of on recorded inputs x: the same objective, cheaper to evaluate, so a
    comparison of times is fair to it.

    Args:
        deltas, moments, prior, prior_weight: as in `full_support`.
        steps: LBFGS iterations at most.
    """
    fused = torch.stack(list(deltas)).mean(0).requires_grad_()
    optimizer = torch.optim.LBFGS([fused], lr=1.0, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(fused, deltas, moments, prior, prior_weight)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return fused.detach()
