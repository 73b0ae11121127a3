"""Bootstrap intervals of mean scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts and seeds, or over more axes, and its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """Return the estimate of the scores that `bootstrap_interval` takes."""
        low, high = bootstrap_interval(values)
        return cls(mean=values.double().nanmean().item(), low=low, high=high)

    def rounded(self, digits: int) -> dict[str, float]:
        """Return the three numbers by name, for JSON."""
        return {key: round(value, digits) for key, value in vars(self).items()}


def format_estimate(estimate: Estimate | Mapping[str, float], sign: str = "") -> str:
    """Return "mean [low, high]" with three digits; `sign` is "+" for differences."""
    values = vars(estimate) if isinstance(estimate, Estimate) else estimate
    mean, low, high = (f"{values[key]:{sign}.3f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def bootstrap_interval(values: Tensor, seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Return a percentile interval of the mean over prompts and seeds, or over more axes, all taken as samples.

    Each axis is resampled with replacement, independently of the others: the seeds are the same for every prompt, so
    the images of a row, and those of a column, are not independent (Owen 2007, "The pigeonhole bootstrap"). An axis of
    length 1 adds no width.

    Args:
        values: (prompts, seeds), (prompts, concepts, seeds) or any number of axes; NaN where there is no image. At
            least one value is not NaN.
        level: fraction of the distribution of the mean between the ends.

    Returns:
        (low, high).
    """
    generator = torch.Generator().manual_seed(seed)
    shares = [_resampling(count, draws, generator) for count in values.shape]
    is_given = ~values.isnan()
    origin = values[is_given][0].double()  # differences from it: equal values give no width, not even by rounding
    weights = _weighted(is_given.double(), shares)
    means = (_weighted((values.double() - origin).nan_to_num(0), shares) / weights)[weights > 0]
    tail = (1 - level) / 2
    low, high = (origin + means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))).tolist()
    return low, high


def _weighted(values: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """Return (draws,): for each resampling the sum of values, each weighted by its shares along all axes."""
    first, *others = shares
    left = (first @ values.flatten(1)).unflatten(1, values.shape[1:])
    for share in others:
        left = (left * share.reshape(*share.shape, *[1] * (left.dim() - 2))).sum(1)
    return left


def _resampling(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """Return (draws, count) float64: each item's share in a sample of `count` items, a new sample in each row."""
    samples = torch.randint(count, (draws, count), generator=generator)
    share = torch.full(samples.shape, 1 / count, dtype=torch.float64)
    return torch.zeros_like(share).scatter_add_(1, samples, share)
