"""Where in an image the tokens of each concept are, from the cross-attention while the image is generated."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

SHARPNESS = 4.0  # how strongly a position goes to the concept with the most attention there


def grid(positions: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a layer with this many positions, in a U-Net that halves latents of this size."""
    height, width = size
    while height * width > positions:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    assert height * width == positions, (positions, size)
    return height, width


class AttentionMaps:
    """The attention to each concept's tokens, averaged over heads, layers and the steps so far.

    A concept acts fully where the attention to its tokens is above its average over the image, and proportionally less
    below. Where several concepts overlap, the strongest gets most (compare FreeFuse, arXiv 2510.23515, whose masks come
    from the same maps).

    Args:
        tokens: concept -> the positions of its tokens in the prompt.
        size: height and width of the latents.
    """

    def __init__(self, tokens: Mapping[str, Sequence[int]], size: tuple[int, int]) -> None:
        self._tokens, self._size = tokens, size
        self._sums: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    def observe(self, attention: Attention, hidden: Tensor, text: Tensor, rows: slice) -> None:
        """Record one cross-attention layer.

        Args:
            hidden: (all rows, positions, channels), the layer's image side.
            text: (all rows, tokens, channels).
            rows: those to record.
        """
        assert attention.to_k is not None
        query, key = (attention.head_to_batch_dim(x) for x in (attention.to_q(hidden), attention.to_k(text)))
        shares = attention.get_attention_scores(query, key).unflatten(0, (len(hidden), -1))[rows].mean(1).float()
        for name, positions in self._tokens.items():
            own = shares[..., list(positions)].sum(-1).unflatten(1, grid(hidden.shape[1], self._size))
            large = F.interpolate(own[:, None], self._size, mode="bilinear")[:, 0]
            self._sums[name] = self._sums.get(name, torch.zeros_like(large)) + large

    def renew(self) -> None:
        """Update the masks from everything recorded so far."""
        if not self._sums:
            return
        scores = {name: sums / sums.mean((1, 2), keepdim=True) for name, sums in self._sums.items()}
        total = torch.stack([score**SHARPNESS for score in scores.values()]).sum(0)
        self._masks = {name: score.clamp(max=1) * score**SHARPNESS / total for name, score in scores.items()}

    def mask(self, name: str, positions: int) -> Tensor | None:
        """Return a mask (rows, positions) from 0 to 1, or None before the first `renew`."""
        if name not in self._masks:
            return None
        return F.adaptive_avg_pool2d(self._masks[name], grid(positions, self._size)).flatten(1)
