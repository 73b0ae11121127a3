"""How well images agree with texts and references: the published scores, as pure functions on embeddings.

Every embedding is a row of float32, L2-normalised, as encoders.py gives them: a dot product is a cosine.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CLIPSCORE_WEIGHT = 2.5  # w in Hessel et al. 2021, section 3


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """The raw cosine of every image and its own text.

    Args:
        images, texts: (n, d) float32 unit rows.

    Returns:
        (n,) in [-1, 1].
    """
    assert images.shape == texts.shape
    return (images * texts).sum(-1)


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """CLIPScore of every image and its own text, 2.5·max(cos, 0) (Hessel et al. 2021, equation 1).

    Args:
        images, texts: (n, d) float32 unit rows.

    Returns:
        (n,) in [0, 2.5].
    """
    return CLIPSCORE_WEIGHT * cosine(images, texts).clamp(min=0)


def image_alignment(images: Tensor, references: Tensor) -> Tensor:
    """The mean cosine of every image over all references, not scaled (Custom Diffusion, Kumari et al. 2023).

    Args:
        images: (n, d) float32 unit rows.
        references: (m, d), m > 0.

    Returns:
        (n,) in [-1, 1].
    """
    assert len(references) > 0
    return (images @ references.T).mean(-1)


def mos_image_alignment(images: Tensor, references: Tensor) -> Tensor:
    """`image_alignment` with every pair clipped at 0, as Mix-of-Show scores (Gu et al. 2023); (n,) in [0, 1]."""
    assert len(references) > 0
    return (images @ references.T).clamp(min=0).mean(-1)


def mos_first_reference(images: Tensor, references: Tensor) -> Tensor:
    """What Mix-of-Show's published script really computes: `mos_image_alignment` with the first reference alone."""
    return mos_image_alignment(images, references[:1])


def overall(text: float, image: float) -> float:
    """One number to choose a checkpoint by: the harmonic mean of two mean cosines, 0 if one is not positive.

    A checkpoint that forgets the prompt scores as low as one that misses the subject. Never a result of its own.
    """
    return 2 * text * image / (text + image) if min(text, image) > 0 else 0.0


def class_rank(images: Tensor, references: Sequence[Tensor]) -> Tensor:
    """The image alignment of every image with each of K concepts.

    Args:
        images: (n, d) float32 unit rows.
        references: for each concept its references (m_k, d), m_k > 0.

    Returns:
        (n, K).
    """
    return torch.stack([image_alignment(images, each) for each in references], dim=-1)


def succeeds(scores: Tensor, which: int) -> Tensor:
    """Whether one concept ranks first, strictly before all others: a tie is no success.

    Args:
        scores: (n, K) from `class_rank`; with K = 1 all succeed.
        which: the concept's column.

    Returns:
        (n,) bool.
    """
    others = torch.cat([scores[:, :which], scores[:, which + 1 :]], dim=1)
    return (scores[:, which, None] > others).all(-1)


def bootstrap_interval(values: Tensor, seed: int = 0, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """A percentile interval of the mean over prompts and seeds, or over more than these, all taken as samples.

    What lies along an axis is drawn anew, with replacement, each axis for itself: the seeds are the same for every
    prompt, so the images of a row, and those of a column, are not independent (Owen 2007, "The pigeonhole
    bootstrap"). An axis of length 1 adds no width.

    Args:
        values: (prompts, seeds) or any number of axes, as (prompts, concepts, seeds); one score an image, NaN where
            there is none. One score is there at least.
        level: how much of the distribution of the mean lies between the ends.

    Returns:
        (low, high).
    """
    generator = torch.Generator().manual_seed(seed)
    shares = [_resampling(count, draws, generator) for count in values.shape]
    there = ~values.isnan()
    origin = values[there][0].double()  # differences from it: equal values give no width, not even by rounding
    weights = _weighted(there.double(), shares)
    means = (_weighted((values.double() - origin).nan_to_num(0), shares) / weights)[weights > 0]
    tail = (1 - level) / 2
    low, high = (origin + means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))).tolist()
    return low, high


def _weighted(values: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """(draws,): in each draw the sum of values, each times its shares along all axes."""
    first, *others = shares
    left = (first @ values.flatten(1)).unflatten(1, values.shape[1:])
    for share in others:
        left = (left * share.reshape(*share.shape, *[1] * (left.dim() - 2))).sum(1)
    return left


def _resampling(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """(draws, count) float64: the share that each of `count` things has in a sample of `count`, drawn anew each row."""
    drawn = torch.randint(count, (draws, count), generator=generator)
    share = torch.full(drawn.shape, 1 / count, dtype=torch.float64)
    return torch.zeros_like(share).scatter_add_(1, drawn, share)


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """The share of (positive, negative) pairs in which the positive scores higher; a tie counts half.

    Args:
        positive: (n,), n > 0.
        negative: (m,), m > 0.
    """
    assert len(positive) > 0 < len(negative)
    ordered = negative.sort().values.contiguous()
    below, not_above = (torch.searchsorted(ordered, positive.contiguous(), right=right) for right in (False, True))
    return (below + not_above).sum().item() / (2 * len(positive) * len(negative))


def mos_text(prompt: str, tokens: Mapping[str, str]) -> str:
    """What Mix-of-Show compares an image with: "A photo depicts " and the prompt in plain words.

    Args:
        prompt: such as "a <dog1> <dog2> on the beach".
        tokens: token -> class noun, such as {"<dog1>": "dog", "<dog2>": "dog"}.
    """
    return "A photo depicts " + cd_text(prompt, tokens)


def cd_text(prompt: str, tokens: Mapping[str, str]) -> str:
    """What Custom Diffusion compares an image with: the prompt without modifier tokens, white space tidied.

    A token that stands before its class noun, "<new1> dog", is left out; one that stands in its place becomes the noun.
    Several tokens of one noun in a row count as one.

    Args:
        prompt, tokens: as for `mos_text`.
    """
    for noun in dict.fromkeys(tokens.values()):
        any_token = "|".join(_whole(token) for token, its_noun in tokens.items() if its_noun == noun)
        run = rf"(?:{any_token})(?:\s+(?:{any_token}))*"
        followed = rf"(?P<followed>\s+(?=(?i:{re.escape(noun)})(?!\w)))?"
        prompt = re.sub(run + followed, lambda match, noun=noun: "" if match["followed"] else noun, prompt)
    return " ".join(prompt.split())


def _whole(token: str) -> str:
    """A pattern of the token: one that begins or ends like a word does not match inside a longer word."""
    return rf"(?:\b|(?=\W)){re.escape(token)}(?:\b|(?<=\W))"
