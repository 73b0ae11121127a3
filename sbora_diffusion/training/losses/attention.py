"""Attention regularisation (Mix-of-Show, Gu et al. 2023, section 3.2): keep the token's attention inside the masks.

For every cross-attention layer of the U-Net the learned token's attention, averaged over heads and divided by its
largest value, is compared with the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from sbora_diffusion.data.batches import Sample, StepBatch
from sbora_diffusion.inference.attention_maps import grid
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.tokens import is_learned
from sbora_diffusion.utils.errors import SboraError

CROSS = ".attn2."


class AttentionLoss:
    """The mean squared difference between the token's attention and the masks, of the recorded batch."""

    def __init__(self, base: Base, weight: float = 1.0) -> None:
        if base.family.denoiser != "unet":
            raise SboraError(
                f"attention_weight needs a U-Net's cross-attention, {base.id} has none", "--set attention_weight=0"
            )
        self.weight, self._base = weight, base
        self._losses: list[Tensor] = []

    @contextmanager
    def recording(self, batch: StepBatch) -> Iterator[None]:
        """Record the attention of the concept samples, the first rows of their forward pass."""
        sample = batch.concept
        assert sample.masks is not None
        unet: Any = self._base.denoiser
        before = dict(unet.attn_processors)
        self._losses = []
        recorders = {key: _Recorder(one, self, sample) if CROSS in key else one for key, one in before.items()}
        try:
            unet.set_attn_processor(recorders)
            yield
        finally:
            unet.set_attn_processor(before)

    def observe(self, attention: Any, hidden: Tensor, text: Tensor, sample: Sample) -> None:
        """Add the loss of one layer: hidden (rows, positions, channels) and text (rows, tokens, channels)."""
        assert sample.masks is not None
        rows, is_token = len(sample.t), is_learned(self._base, sample.ids)
        query, key = attention.to_q(hidden[:rows]), attention.to_k(text[:rows])
        query, key = attention.head_to_batch_dim(query), attention.head_to_batch_dim(key)
        shares = attention.get_attention_scores(query, key).unflatten(0, (rows, -1)).mean(1).float()
        of_token = (shares * is_token[:, None]).sum(-1)  # (rows, positions)
        shape = grid(hidden.shape[1], (sample.masks.shape[-2], sample.masks.shape[-1]))
        mask = F.adaptive_avg_pool2d(sample.masks, shape).flatten(1)
        named = is_token.any(1)  # the empty caption does not
        if named.any():
            largest = of_token.amax(1, keepdim=True).clamp(min=1e-6)
            self._losses.append(((of_token / largest - mask).pow(2).mean(1) * named).sum() / named.sum())

    def __call__(self, *_: object) -> Tensor:
        """Return the mean over the layers."""
        return torch.stack(self._losses).mean() if self._losses else torch.zeros((), device=self._base.device)


class _Recorder:
    """A cross-attention processor that passes its inputs to the loss."""

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
