"""Closed-form fusion: the one merged delta that answers each concept's own inputs most like that concept alone.

For every layer, over all ΔW on the union of the concepts' columns (FA) or rows (FB):

    minimise  Σ_j E‖(ΔW − ΔW_j) x_j‖² + λ E‖ΔW x_prior‖² + ε ‖ΔW − Σ_j ΔW_j‖²

x_j are the inputs that the layer sees while concept j's own model draws concept j. This is the objective of gradient
fusion (Mix-of-Show, Gu et al. 2023), which that paper minimises by LBFGS, with a term for inputs that belong to no
concept. It is a linear least-squares problem, so one symmetric positive definite solve a layer has the optimum.

The optimum is quieter than the concepts are: least squares leaves out whatever of their answers cannot be told apart.
So each layer's ΔW is scaled until its answers to the concepts' inputs have the energy of their own ("as loud"),
Σ_j E‖ΔW x_j‖² = Σ_j E‖ΔW_j x_j‖²: further away by the objective above, and closer in the images (docs/results.md).
No paper has this; the factor is one number a layer, from the moments that the solve has seen anyway.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Side
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.adapters.merge import in_order, put_together

PRIOR_WEIGHT = 0.3  # of 0 to 1, a little the best on emoji64: docs/results.md
RIDGE = 1e-3  # of the mean second moment of an input

Inputs = Callable[[Adapter | None, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Moments E[x xᵀ], (n, n) float64, of the inputs of each layer under a concept's own model, or of the prior (None).

Only of the given columns (n,) of each layer: "<component>.<canonical layer>" -> int64."""


def fuse(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    inputs: Inputs,
    *,
    prior_weight: float = PRIOR_WEIGHT,
    ridge: float = RIDGE,
    as_loud: bool = True,
) -> Adapter:
    """Merge adapters of one base by the closed form above; ΔW_j are the adapters' deltas times their weights.

    The result is an ordinary adapter over the union of the columns or rows, the same bit for bit whatever the order of
    the arguments (if `inputs` gives the same). One adapter alone, with λ = 0, stays what it is up to rounding.

    Args:
        inputs: asked once for each adapter, one after the other, and once for the prior if λ > 0.
        prior_weight: λ, from 0 on.
        ridge: ε as a share of the mean diagonal entry of Σ_j E[x_j x_jᵀ] + λ E[x_prior x_priorᵀ]; greater than 0.
        as_loud: scale the optimum as said above; False is the optimum itself.

    Raises:
        SboraError: adapters that cannot be merged, as in `merge`.
    """
    assert prior_weight >= 0 < ridge
    adapters, weights = in_order(adapters, weights)
    side = adapters[0].spec.side
    unions = {key: _union(key, adapters) for key in sorted({key for adapter in adapters for key in adapter.factors})}
    columns = {key: union if side == "fa" else torch.arange(_width(key, adapters)) for key, union in unions.items()}
    systems = {key: System() for key in unions}
    for adapter, weight in zip(adapters, weights, strict=True):
        moments = inputs(adapter, columns)
        for key, system in systems.items():
            system.add(_on_support(key, adapter, adapters, side, unions[key]) * weight, moments[key])
    if prior_weight:
        moments = inputs(None, columns)
        for key, system in systems.items():
            system.add_prior(moments[key] * prior_weight)
    recipe = {"how": "fuse", "prior_weight": prior_weight, "ridge": ridge, "as_loud": as_loud}
    solved = {key: system.solve(ridge) for key, system in systems.items()}
    if as_loud:
        solved = {key: systems[key].as_loud(delta) for key, delta in solved.items()}
    factors = {key: Factor(unions[key], delta.float()) for key, delta in solved.items()}
    return put_together(adapters, weights, factors, recipe)


@dataclass(eq=False)
class System:
    """The normal equations of one layer, ΔW · (seen + prior) = answers, summed up concept by concept in float64."""

    seen: Tensor | None = None  # (n, n) Σ M_j
    prior: Tensor | None = None  # (n, n) λ P
    answers: Tensor | None = None  # (m, n) Σ ΔW_j M_j
    total: Tensor | None = None  # (m, n) Σ ΔW_j
    energy: float = 0.0  # Σ E‖ΔW_j x_j‖²

    def add(self, delta: Tensor, moments: Tensor) -> None:
        """A concept's ΔW_j (m, n) and M_j (n, n)."""
        delta, moments = delta.double(), moments.double()
        answers = delta @ moments
        self.energy += (answers * delta).sum().item()
        self.seen = _added(self.seen, moments)
        self.answers = _added(self.answers, answers)
        self.total = _added(self.total, delta)

    def add_prior(self, moments: Tensor) -> None:
        """λ P (n, n)."""
        self.prior = moments.double()

    def solve(self, ridge: float) -> Tensor:
        """ΔW (m, n) float64; the plain sum where no input was ever seen."""
        assert self.seen is not None
        assert self.answers is not None
        assert self.total is not None
        gram = self.seen if self.prior is None else self.seen + self.prior
        mean = gram.diagonal().mean().item()
        epsilon = ridge * mean if mean > 0 else 1.0
        factor = torch.linalg.cholesky(gram + epsilon * torch.eye(len(gram)).to(gram))
        return torch.cholesky_solve((self.answers + epsilon * self.total).T, factor).T

    def as_loud(self, delta: Tensor) -> Tensor:
        """ΔW (m, n) times what gives its answers to the concepts' inputs the energy of the concepts' own."""
        assert self.seen is not None
        answered = response(delta, self.seen).item()
        return delta * math.sqrt(self.energy / answered) if answered > 0 else delta


def full_support(
    deltas: Sequence[Tensor], moments: Sequence[Tensor], prior: Tensor, *, prior_weight: float, ridge: float = RIDGE
) -> Tensor:
    """The optimum over all columns, (out, in) float64: what Mix-of-Show's gradient fusion converges to, for comparison.

    Args:
        deltas: each concept's ΔW_j (out, in).
        moments: each concept's E[x_j x_jᵀ] (in, in).
        prior: E[x_prior x_priorᵀ].
    """
    system = System()
    for delta, seen in zip(deltas, moments, strict=True):
        system.add(delta, seen)
    system.add_prior(prior_weight * prior)
    return system.solve(ridge)


def objective(
    delta: Tensor, deltas: Sequence[Tensor], moments: Sequence[Tensor], prior: Tensor, prior_weight: float
) -> Tensor:
    """Σ_j E‖(ΔW − ΔW_j) x_j‖² + λ E‖ΔW x_prior‖² of one layer, a scalar; arguments as in `full_support`."""
    own = [response(delta - each, seen) for each, seen in zip(deltas, moments, strict=True)]
    return torch.stack(own).sum() + prior_weight * response(delta, prior)


def response(delta: Tensor, moments: Tensor) -> Tensor:
    """E‖ΔW x‖² = tr(ΔW E[x xᵀ] ΔWᵀ); of a batch of layers, their sum."""
    return ((delta @ moments) * delta).sum()


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    """The total, in place, with more; a copy of more where there is no total yet."""
    return more.clone() if total is None else total.add_(more)


def _union(key: str, adapters: Sequence[Adapter]) -> Tensor:
    return torch.cat([adapter.factors[key].index for adapter in adapters if key in adapter.factors]).unique()


def _width(key: str, adapters: Sequence[Adapter]) -> int:
    """Of FB: how many columns the layer has."""
    return next(adapter.factors[key].weight.shape[1] for adapter in adapters if key in adapter.factors)


def _on_support(key: str, adapter: Adapter, adapters: Sequence[Adapter], side: Side, union: Tensor) -> Tensor:
    """A concept's delta on all the columns (out, |union|) or rows (|union|, in); zero if it leaves the layer alone."""
    like = next(each.factors[key].weight for each in adapters if key in each.factors)
    shape = (len(like), len(union)) if side == "fa" else (len(union), like.shape[1])
    delta = torch.zeros(shape, dtype=torch.float64)
    if key in adapter.factors:
        factor = adapter.factors[key]
        delta.index_copy_(int(side == "fa"), torch.searchsorted(union, factor.index), factor.weight.double())
    return delta
