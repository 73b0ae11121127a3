"""Attention regularisation (Mix-of-Show, Gu et al. 2023, section 3.2): the token looks where the mask says.

For every cross-attention layer of the U-Net the attention that the learned token gets, averaged over heads and divided
by its largest value, is compared with the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from sbora_diffusion.data.batches import Sample
from sbora_diffusion.inference.attention_maps import grid
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.tokens import is_learned
from sbora_diffusion.utils.errors import SboraError

CROSS = ".attn2."


class AttentionLoss:
    """The mean squared difference between the token's attention and the masks, of the last recorded batch."""

    def __init__(self, base: Base) -> None:
        if base.family.denoiser != "unet":
            raise SboraError(f"attention_weight needs a U-Net's cross-attention, {base.id} has none", "set it to 0")
        self._base = base
        self._losses: list[Tensor] = []

    @contextmanager
    def recording(self, sample: Sample) -> Iterator[None]:
        """Look at the attention of a batch's first rows, which are the sample's."""
        assert sample.masks is not None
        unet: Any = self._base.denoiser
        before = dict(unet.attn_processors)
        self._losses = []
        watched = {key: _Watched(one, self, sample) if CROSS in key else one for key, one in before.items()}
        try:
            unet.set_attn_processor(watched)
            yield
        finally:
            unet.set_attn_processor(before)

    def observe(self, attention: Any, hidden: Tensor, text: Tensor, sample: Sample) -> None:
        """One layer: hidden (rows, positions, channels) and text (rows, tokens, channels)."""
        assert sample.masks is not None
        rows, is_token = len(sample.t), is_learned(self._base, sample.ids)
        query, key = attention.to_q(hidden[:rows]), attention.to_k(text[:rows])
        query, key = attention.head_to_batch_dim(query), attention.head_to_batch_dim(key)
        shares = attention.get_attention_scores(query, key).unflatten(0, (rows, -1)).mean(1).float()
        found = (shares * is_token[:, None]).sum(-1)  # (rows, positions)
        shape = grid(hidden.shape[1], (sample.masks.shape[-2], sample.masks.shape[-1]))
        wanted = F.adaptive_avg_pool2d(sample.masks, shape).flatten(1)
        named = is_token.any(1)  # not in the empty caption
        if named.any():
            largest = found.amax(1, keepdim=True).clamp(min=1e-6)
            self._losses.append(((found / largest - wanted).pow(2).mean(1) * named).sum() / named.sum())

    def __call__(self) -> Tensor:
        """A scalar that adapter and token learn from."""
        return torch.stack(self._losses).mean() if self._losses else torch.zeros((), device=self._base.device)


class _Watched:
    """A cross-attention processor that lets somebody look on."""

    def __init__(self, inner: Any, loss: AttentionLoss, sample: Sample) -> None:
        self._inner, self._loss, self._sample = inner, loss, sample

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        self._loss.observe(attn, hidden_states, encoder_hidden_states, self._sample)
        return self._inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
