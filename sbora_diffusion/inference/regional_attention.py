"""Several prompts in one image: each position attends to its own, and concepts act where their prompt applies."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from sbora_diffusion.inference.attention_maps import AttentionMaps, grid
from sbora_diffusion.inference.gating import Masks

CROSS = ".attn2."
TEXT_SIDE = (".attn2.to_k", ".attn2.to_v")


@dataclass(frozen=True, eq=False)
class Branch:
    """One prompt of an image and where it applies."""

    embeddings: Tensor  # (images, tokens, hidden)
    text_masks: Masks  # concept -> (tokens,)
    weights: Tensor  # (height, width) at any resolution, from 0 to 1; those of all branches sum to 1


class RegionalAttention:
    """Masks of all concepts in every layer, while a U-Net generates images of the same prompts.

    A batch of the U-Net has `num_uncond` unconditional rows, which no concept ever changes, then one row per image.
    Inside cross-attention the latter are repeated once per branch and blended by the branches' weights, which equals
    cross-attention with soft masks. The first branch is the global prompt.

    Args:
        size: height and width of the latents.
        maps: where the concepts of the global prompt are; None for everywhere.
    """

    def __init__(
        self, branches: Sequence[Branch], num_uncond: int, size: tuple[int, int], maps: AttentionMaps | None
    ) -> None:
        self._branches, self._num_uncond, self._size, self._maps = branches, num_uncond, size, maps
        self._num_images = len(branches[0].embeddings)
        self._names = sorted({name for branch in branches for name in branch.text_masks})
        self._text_masks = {name: self._below_uncond(self._text_rows(name)) for name in self._names}
        self._masks: dict[tuple[bool, int], dict[str, Tensor]] = {}

    def masks(self, layer: str, shape: torch.Size) -> Masks:
        """Return the masks of a layer of the U-Net: concept -> (rows, positions)."""
        if layer.endswith(TEXT_SIDE):
            return self._text_masks
        key = (CROSS in layer, shape[1])
        if key not in self._masks:
            rows = self._cross_rows if CROSS in layer else self._image_rows
            self._masks[key] = {name: self._below_uncond(rows(name, shape[1])) for name in self._names}
        return self._masks[key]

    def next_step(self) -> None:
        """Use the attention maps of the step before."""
        if self._maps:
            self._maps.renew()
            self._masks.clear()

    def spread(self, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Repeat the images' rows (rows, positions, channels) for every branch, with its text."""
        if len(self._branches) == 1:
            return hidden, text
        uncond, images = hidden.split([self._num_uncond, self._num_images])
        texts = [branch.embeddings.to(text) for branch in self._branches]
        return torch.cat([uncond, *[images] * len(texts)]), torch.cat([text[: self._num_uncond], *texts])

    def gather(self, hidden: Tensor) -> Tensor:
        """Blend the branches of each image: the inverse of `spread`."""
        if len(self._branches) == 1:
            return hidden
        uncond, images = hidden[: self._num_uncond], hidden[self._num_uncond :].chunk(len(self._branches))
        weights = torch.stack([self._weights(branch, hidden.shape[1]) for branch in self._branches]).to(hidden)
        return torch.cat([uncond, torch.einsum("bp,bnpc->npc", weights, torch.stack(images))])

    def observe(self, attention: Attention, hidden: Tensor, text: Tensor) -> None:
        """Record the global prompt's rows of a cross-attention layer in the maps."""
        if self._maps:
            rows = slice(self._num_uncond, self._num_uncond + self._num_images)
            self._maps.observe(attention, hidden, text, rows)

    def _text_rows(self, name: str) -> Tensor:
        """(branches · images, tokens)."""
        rows = []
        for branch in self._branches:
            none = torch.zeros(branch.embeddings.shape[1], device=branch.embeddings.device)
            rows.append(branch.text_masks.get(name, none).expand(self._num_images, -1))
        return torch.cat(rows)

    def _cross_rows(self, name: str, positions: int) -> Tensor:
        """(branches · images, positions) for the image side of cross-attention, before the branches are blended."""
        return torch.cat([self._presence(number, name, positions) for number in range(len(self._branches))])

    def _image_rows(self, name: str, positions: int) -> Tensor:
        """(images, positions) for self-attention: the weights of the branches in which the concept acts."""
        shares = [
            self._weights(branch, positions) * self._presence(number, name, positions)
            for number, branch in enumerate(self._branches)
        ]
        return torch.stack(shares).sum(0)

    def _presence(self, number: int, name: str, positions: int) -> Tensor:
        """(images, positions): everywhere in a region; in the global prompt where the maps locate the concept."""
        branch = self._branches[number]
        shape = (self._num_images, positions)
        if name not in branch.text_masks:
            return torch.zeros(shape, device=branch.embeddings.device)
        found = self._maps.mask(name, positions) if self._maps and number == 0 else None
        return torch.ones(shape, device=branch.embeddings.device) if found is None else found

    def _weights(self, branch: Branch, positions: int) -> Tensor:
        """(positions,)."""
        return F.adaptive_avg_pool2d(branch.weights[None], grid(positions, self._size)).flatten()

    def _below_uncond(self, rows: Tensor) -> Tensor:
        return torch.cat([torch.zeros(self._num_uncond, rows.shape[1], device=rows.device), rows])


class BranchedAttention:
    """A cross-attention processor that wraps the given one."""

    def __init__(self, inner: Any, regions: RegionalAttention) -> None:
        self._inner, self._regions = inner, regions

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        hidden, text = self._regions.spread(hidden_states, encoder_hidden_states)
        self._regions.observe(attn, hidden, text)
        return self._regions.gather(self._inner(attn, hidden, text, attention_mask, temb))


@contextmanager
def regional_attention(unet: UNet2DConditionModel, regions: RegionalAttention) -> Iterator[None]:
    """Give a U-Net's cross-attention its branches, and restore its processors at the end."""
    before: dict[str, Any] = dict(unet.attn_processors)
    handle = unet.register_forward_pre_hook(lambda _module, _inputs: regions.next_step())
    try:
        branched: dict[str, Any] = {
            key: BranchedAttention(inner, regions) if CROSS in key else inner for key, inner in before.items()
        }
        unet.set_attn_processor(branched)
        yield
    finally:
        unet.set_attn_processor(before)
        handle.remove()
