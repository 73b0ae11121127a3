"""Merges of methods that change whole weights, from their papers' formulas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sbora_diffusion.adapters.file import Adapter, Dense
from sbora_diffusion.adapters.fuse import response
from sbora_diffusion.adapters.merge import in_order, put_together

STEPS = {"text_encoder": 500, "text_encoder_2": 500, "unet": 50, "transformer": 50}  # of gradient fusion's code
_RIDGE = 1e-6  # of the mean diagonal entry: prompts of which some directions never occur


def weighted_sum(
    adapters: Sequence[Adapter], weights: Sequence[float], layers: Mapping[str, nn.Linear], how: str
) -> Adapter:
    """ΔW = Σ weight · ΔW_i: low-rank factors are put side by side; DoRA's changes become whole matrices.

    With weights 1/n this is federated averaging of the weights (McMahan et al. 2017).

    Args:
        layers: the untouched base model's, for DoRA.
    """
    adapters, weights = in_order(adapters, weights)
    return _merge_layers(adapters, weights, how, lambda key: _sum_layer(key, adapters, weights, layers))


def fuse_by_gradient(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    moments: Sequence[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
) -> Adapter:
    """Mix-of-Show's gradient fusion (Gu et al. 2023, eq. 6), layer by layer, by LBFGS over whole weights.

    Args:
        moments: for each adapter E[x xᵀ] (in, in) of each layer's inputs under the adapter's own model.
        device: where it is computed.
    """
    of_adapter = {id(adapter): seen for adapter, seen in zip(adapters, moments, strict=True)}
    adapters, weights = in_order(adapters, weights)

    def fuse_layer(key: str) -> Dense:
        seen = [of_adapter[id(adapter)][key].to(device) for adapter in adapters]
        pairs = zip(adapters, weights, strict=True)
        deltas = [adapter.dense[key].delta(None).to(device).double() * weight for adapter, weight in pairs]
        steps = STEPS[key.partition(".")[0]]
        fused = gradient_fusion(deltas, seen, torch.zeros_like(seen[0]), prior_weight=0.0, steps=steps)
        return Dense(fused.float().cpu())

    return _merge_layers(adapters, weights, "gradient", fuse_layer)


def merge_constrained(
    adapters: Sequence[Adapter], weights: Sequence[float], texts: Sequence[Tensor], prior: Tensor
) -> Adapter:
    """Custom Diffusion's closed form (Kumari et al. 2023, eq. 4): each concept's words keep their responses.

    Args:
        texts: for each adapter (n, d), the text encoder's states at the concept's words.
        prior: (d, d) E[c cᵀ] of the states c of prompts without any concept.
    """
    of_adapter = {id(adapter): text for adapter, text in zip(adapters, texts, strict=True)}
    adapters, weights = in_order(adapters, weights)
    words = [of_adapter[id(adapter)] for adapter in adapters]

    def solve_layer(key: str) -> Dense:
        triples = zip(adapters, weights, words, strict=True)
        wanted = [weight * adapter.dense[key].delta(None).double() @ own.double().T for adapter, weight, own in triples]
        return Dense(constrained_least_squares(torch.cat(wanted, dim=1), torch.cat(words), prior).float())

    return _merge_layers(adapters, weights, "constrained", solve_layer)


def constrained_least_squares(wanted: Tensor, words: Tensor, prior: Tensor) -> Tensor:
    """Return the ΔW (out, d) float64 with ΔW cᵀ = wanted for all words c that moves the prior prompts least.

    ΔW = V (C P⁻¹ Cᵀ)⁻¹ C P⁻¹, by Lagrange multipliers: minimise tr(ΔW P ΔWᵀ) under ΔW Cᵀ = V.

    Args:
        wanted: V (out, n).
        words: C (n, d).
        prior: P (d, d).
    """
    prior, words = prior.double(), words.double()
    prior = prior + _RIDGE * prior.diagonal().mean() * torch.eye(len(prior), dtype=torch.float64)
    solved = torch.linalg.solve(prior, words.T).T  # C P⁻¹
    return wanted.double() @ torch.linalg.pinv(words @ solved.T, rtol=1e-9, hermitian=True) @ solved


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


def _merge_layers(
    adapters: Sequence[Adapter], weights: Sequence[float], how: str, merge_layer: Callable[[str], Dense]
) -> Adapter:
    dense = {key: merge_layer(key) for key in sorted({key for adapter in adapters for key in adapter.dense})}
    merged = put_together(adapters, weights, {}, {"how": how})
    ranks = [each.up.shape[1] for each in dense.values() if each.down is not None]
    return replace(merged, dense=dense, spec=replace(merged.spec, rank=max(ranks, default=1)))


def _sum_layer(
    key: str, adapters: Sequence[Adapter], weights: Sequence[float], layers: Mapping[str, nn.Linear]
) -> Dense:
    owners = [(a.dense[key], weight) for a, weight in zip(adapters, weights, strict=True) if key in a.dense]
    downs = [dense.down for dense, _ in owners if dense.down is not None and dense.magnitude is None]
    if len(downs) == len(owners):
        return Dense(torch.cat([dense.up * weight for dense, weight in owners], dim=1), torch.cat(downs))
    base = layers[key].weight if key in layers else None
    deltas = [dense.delta(base).double() * weight for dense, weight in owners]
    return Dense(torch.stack(deltas).sum(0).float())
