"""Closed-form fusion: the merged ΔW whose response to each concept's inputs is closest to that concept's own.

For every layer, over all ΔW on the union of the concepts' columns (FA) or rows (FB):

    minimise  Σ_j E‖(ΔW − ΔW_j) x_j‖² + λ E‖ΔW x_prior‖² + ε ‖ΔW − Σ_j ΔW_j‖²

x_j are the layer's inputs while concept j's own model generates concept j. This is the objective of gradient fusion
(Mix-of-Show, Gu et al. 2023), which that paper minimises by LBFGS, plus a term for inputs of no concept. It is a linear
least-squares problem, so one symmetric positive definite solve per layer finds the optimum.

The optimum has a smaller response norm than the concepts, because least squares drops the part of their responses that
cannot be separated. So each layer's ΔW is rescaled to match the response norm on the concepts' inputs,
Σ_j E‖ΔW x_j‖² = Σ_j E‖ΔW_j x_j‖²: the objective gets worse, the images better (docs/results.md). This is not from a
paper; it is one factor per layer, from moments that the solve needs anyway.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.file import Adapter, Factor

PRIOR_WEIGHT = 0.3  # slightly the best value from 0 to 1 on emoji64: docs/results.md
RIDGE = 1e-3  # of the mean second moment of an input

Inputs = Callable[[Adapter | None, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Return moments E[x xᵀ], (n, n) float64, of each layer's inputs under a concept's own model, or of the prior (None).

Restricted to the given columns (n,) of each layer: "<component>.<canonical layer>" -> int64."""


def fuse(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    inputs: Inputs,
    *,
    prior_weight: float = PRIOR_WEIGHT,
    ridge: float = RIDGE,
    match_response: bool = True,
) -> Adapter:
    """Merge adapters of one base by the closed form above; ΔW_j are the adapters' deltas times their weights.

    The result is an ordinary adapter over the union of the columns or rows. It does not depend on the order of the
    arguments, bit for bit (if `inputs` does not). A single adapter with λ = 0 is returned unchanged up to rounding.

    Args:
        inputs: called once for each adapter, in turn, and once for the prior if λ > 0.
        prior_weight: λ, at least 0.
        ridge: ε as a fraction of the mean diagonal entry of Σ_j E[x_j x_jᵀ] + λ E[x_prior x_priorᵀ]; greater than 0.
        match_response: rescale the optimum to the concepts' response norm; False returns the optimum itself.

    Raises:
        SboraError: adapters that cannot be merged, as in `merge`.
    """
    assert prior_weight >= 0 < ridge
    from sbora_diffusion.adapters.merge import in_order, put_together

    adapters, weights = in_order(adapters, weights)
    side = adapters[0].spec.side
    keys = sorted({key for adapter in adapters for key in adapter.factors})
    owned = {key: [adapter.factors[key] for adapter in adapters if key in adapter.factors] for key in keys}
    unions = {key: torch.cat([factor.index for factor in factors]).unique() for key, factors in owned.items()}
    widths = {key: factors[0].weight.shape[1] for key, factors in owned.items()}  # of FB
    columns = {key: union if side == "fa" else torch.arange(widths[key]) for key, union in unions.items()}
    systems = {key: System() for key in keys}
    for adapter, weight in zip(adapters, weights, strict=True):
        moments = inputs(adapter, columns)
        for key, system in systems.items():
            delta = _on_support(adapter.factors.get(key), owned[key][0].weight.shape, side, unions[key])
            system.add(delta * weight, moments[key])
    if prior_weight:
        moments = inputs(None, columns)
        for key, system in systems.items():
            system.prior = (moments[key] * prior_weight).double()
    recipe = {"how": "fuse", "prior_weight": prior_weight, "ridge": ridge, "match_response": match_response}
    solved = {key: system.solve(ridge) for key, system in systems.items()}
    if match_response:
        solved = {key: systems[key].match_response(delta) for key, delta in solved.items()}
    factors = {key: Factor(unions[key], delta.float()) for key, delta in solved.items()}
    return put_together(adapters, weights, factors, recipe)


@dataclass(eq=False)
class System:
    """The normal equations of one layer, ΔW · (seen + prior) = responses, summed concept by concept in float64."""

    seen: Any = 0.0  # (n, n) Σ M_j
    prior: Any = 0.0  # (n, n) λ P
    responses: Any = 0.0  # (m, n) Σ ΔW_j M_j
    total: Any = 0.0  # (m, n) Σ ΔW_j
    energy: float = 0.0  # Σ E‖ΔW_j x_j‖²

    def add(self, delta: Tensor, moments: Tensor) -> None:
        """Add a concept's ΔW_j (m, n) and M_j (n, n)."""
        delta, moments = delta.double(), moments.double()
        responses = delta @ moments
        self.energy += (responses * delta).sum().item()
        self.seen, self.responses, self.total = self.seen + moments, self.responses + responses, self.total + delta

    def solve(self, ridge: float) -> Tensor:
        """Return ΔW (m, n) float64; the plain sum if no input was recorded."""
        gram = self.seen + self.prior
        mean = gram.diagonal().mean().item()
        epsilon = ridge * mean if mean > 0 else 1.0
        factor = torch.linalg.cholesky(gram + epsilon * torch.eye(len(gram)).to(gram))
        return torch.cholesky_solve((self.responses + epsilon * self.total).T, factor).T

    def match_response(self, delta: Tensor) -> Tensor:
        """Rescale ΔW (m, n) so that its response norm on the concepts' inputs is the concepts' own."""
        energy = response(delta, self.seen).item()
        return delta * math.sqrt(self.energy / energy) if energy > 0 else delta


def full_support(
    deltas: Sequence[Tensor], moments: Sequence[Tensor], prior: Tensor, *, prior_weight: float, ridge: float = RIDGE
) -> Tensor:
    """Return the optimum over all columns, (out, in) float64, to which Mix-of-Show's gradient fusion converges.

    Args:
        deltas: each concept's ΔW_j (out, in).
        moments: each concept's E[x_j x_jᵀ] (in, in).
        prior: E[x_prior x_priorᵀ].
    """
    system = System()
    for delta, seen in zip(deltas, moments, strict=True):
        system.add(delta, seen)
    system.prior = (prior_weight * prior).double()
    return system.solve(ridge)


def objective(
    delta: Tensor, deltas: Sequence[Tensor], moments: Sequence[Tensor], prior: Tensor, prior_weight: float
) -> Tensor:
    """Return Σ_j E‖(ΔW − ΔW_j) x_j‖² + λ E‖ΔW x_prior‖² of one layer, a scalar; arguments as in `full_support`."""
    own = [response(delta - each, seen) for each, seen in zip(deltas, moments, strict=True)]
    return torch.stack(own).sum() + prior_weight * response(delta, prior)


def response(delta: Tensor, moments: Tensor) -> Tensor:
    """Return E‖ΔW x‖² = tr(ΔW E[x xᵀ] ΔWᵀ), summed over a batch of layers."""
    return ((delta @ moments) * delta).sum()


def _on_support(factor: Factor | None, like: torch.Size, side: Side, union: Tensor) -> Tensor:
    """Return a concept's delta on the union of columns (out, |union|) or rows (|union|, in); 0 without this layer."""
    shape = (like[0], len(union)) if side == "fa" else (len(union), like[1])
    delta = torch.zeros(shape, dtype=torch.float64)
    if factor is not None:
        delta.index_copy_(int(side == "fa"), torch.searchsorted(union, factor.index), factor.weight.double())
    return delta
