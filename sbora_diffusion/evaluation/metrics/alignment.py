"""Text and image alignment: the published scores, as pure functions on embeddings.

Every embedding is a row of float32 with norm 1, so a dot product is a cosine.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CLIPSCORE_WEIGHT = 2.5  # w in Hessel et al. 2021, section 3


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Return the raw cosine of every image and its own text.

    Args:
        images, texts: (n, d) float32 unit rows.

    Returns:
        (n,) in [-1, 1].
    """
    assert images.shape == texts.shape
    return (images * texts).sum(-1)


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Return the CLIPScore of every image and its own text, 2.5·max(cos, 0) (Hessel et al. 2021, equation 1).

    Args:
        images, texts: (n, d) float32 unit rows.

    Returns:
        (n,) in [0, 2.5].
    """
    return CLIPSCORE_WEIGHT * cosine(images, texts).clamp(min=0)


def image_alignment(images: Tensor, references: Tensor) -> Tensor:
    """Return the mean cosine of every image over all references (Custom Diffusion, Kumari et al. 2023).

    Args:
        images: (n, d) float32 unit rows.
        references: (m, d), m > 0.

    Returns:
        (n,) in [-1, 1].
    """
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
    """Return the image alignment of every image with each of K concepts.

    Args:
        images: (n, d) float32 unit rows.
        references: for each concept its references (m_k, d), m_k > 0.

    Returns:
        (n, K).
    """
    return torch.stack([image_alignment(images, each) for each in references], dim=-1)


def succeeds(scores: Tensor, which: int) -> Tensor:
    """Return whether one concept ranks first, strictly before all others: a tie is no success.

    Args:
        scores: (n, K) from `class_rank`; with K = 1 all succeed.
        which: the concept's column.

    Returns:
        (n,) bool.
    """
    others = torch.cat([scores[:, :which], scores[:, which + 1 :]], dim=1)
    return (scores[:, which, None] > others).all(-1)


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """Return the fraction of (positive, negative) pairs in which the positive scores higher; a tie counts half.

    Args:
        positive: (n,), n > 0.
        negative: (m,), m > 0.
    """
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
    """Return a pattern of the token; if it begins or ends like a word, it does not match inside a longer word."""
    return rf"(?:\b|(?=\W)){re.escape(token)}(?:\b|(?<=\W))"
