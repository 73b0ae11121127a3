"""Text and image alignment, the published scores, and bootstrap intervals of their means.

Embeddings are rows of float32 with norm 1, so a dot product is a cosine: `images` (n, d), their `texts` (n, d), or
`references` (m, d), m > 0, of a concept. Scores are (n,).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLIPSCORE_WEIGHT = 2.5  # w in Hessel et al. 2021, section 3


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Return the raw cosine of every image and its own text, in [-1, 1]."""
    assert images.shape == texts.shape
    return (images * texts).sum(-1)


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Return the CLIPScore of every image and its own text, 2.5·max(cos, 0) (Hessel et al. 2021, equation 1)."""
    return CLIPSCORE_WEIGHT * cosine(images, texts).clamp(min=0)


def image_alignment(images: Tensor, references: Tensor) -> Tensor:
    """Return the mean cosine of every image over all references (Custom Diffusion, Kumari et al. 2023)."""
    assert len(references) > 0
    return (images @ references.T).mean(-1)


def mos_image_alignment(images: Tensor, references: Tensor) -> Tensor:
    """Return `image_alignment` with every cosine clipped at 0, as in Mix-of-Show (Gu et al. 2023); (n,) in [0, 1]."""
    assert len(references) > 0
    return (images @ references.T).clamp(min=0).mean(-1)


def mos_first_reference(images: Tensor, references: Tensor) -> Tensor:
    """Return what Mix-of-Show's published script computes: `mos_image_alignment` with the first reference only."""
    return mos_image_alignment(images, references[:1])


def overall(text: float, image: float) -> float:
    """Return the harmonic mean of two mean cosines, 0 if one is not positive, to choose a checkpoint by.

    A checkpoint that ignores the prompt scores as low as one that misses the subject. Not to be reported as a result.
    """
    return 2 * text * image / (text + image) if min(text, image) > 0 else 0.0


def class_rank(images: Tensor, references: Sequence[Tensor]) -> Tensor:
    """Return (n, K): the image alignment of every image with each of K concepts, given by their references."""
    return torch.stack([image_alignment(images, each) for each in references], dim=-1)


def succeeds(scores: Tensor, which: int) -> Tensor:
    """Return (n,) bool: whether the concept of column `which` ranks first, strictly before all others.

    Args:
        scores: (n, K) from `class_rank`; a tie is no success; with K = 1 all succeed.
    """
    others = torch.cat([scores[:, :which], scores[:, which + 1 :]], dim=1)
    return (scores[:, which, None] > others).all(-1)


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """Return the fraction of pairs of (n,) and (m,) scores in which the positive is higher; a tie counts half."""
    assert len(positive) > 0 < len(negative)
    ordered = negative.sort().values.contiguous()
    below, not_above = (torch.searchsorted(ordered, positive.contiguous(), right=right) for right in (False, True))
    return (below + not_above).sum().item() / (2 * len(positive) * len(negative))


def mos_text(prompt: str, tokens: Mapping[str, str]) -> str:
    """Return the text that Mix-of-Show compares an image with: "A photo depicts " and the prompt in plain words.

    Args:
        prompt: such as "a <dog1> <dog2> on the beach".
        tokens: token -> class noun, such as {"<dog1>": "dog", "<dog2>": "dog"}.
    """
    return "A photo depicts " + cd_text(prompt, tokens)


def cd_text(prompt: str, tokens: Mapping[str, str]) -> str:
    """Return the text that Custom Diffusion compares an image with: the prompt without modifier tokens.

    A token before its class noun, "<new1> dog", is left out; a token in place of the noun is replaced by it. Several
    tokens of one noun in a row count as one. White space is normalised.
    """
    for noun in dict.fromkeys(tokens.values()):
        any_token = "|".join(_whole(token) for token, its_noun in tokens.items() if its_noun == noun)
        run = rf"(?:{any_token})(?:\s+(?:{any_token}))*"
        followed = rf"(?P<followed>\s+(?=(?i:{re.escape(noun)})(?!\w)))?"
        prompt = re.sub(run + followed, lambda match, noun=noun: "" if match["followed"] else noun, prompt)
    return " ".join(prompt.split())


def _whole(token: str) -> str:
    """Return a pattern of the token; if it begins or ends like a word, it does not match inside a longer word."""
    return rf"(?:\b|(?=\W)){re.escape(token)}(?:\b|(?<=\W))"


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
