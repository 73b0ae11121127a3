"""Tokens with an embedding of their own for each cross-attention layer: P+ (Voynov et al. 2023) and ED-LoRA.

The text encoder encodes a prompt once for each cross-attention layer, with that layer's embeddings; its outputs are
concatenated in the last dimension, (batch, length, layers · hidden), and every layer takes its own part.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.models.base import Base
from sbora_diffusion.models.tokens import added_tokens
from sbora_diffusion.utils.errors import SboraError


class LayerwiseEmbedding(nn.Module):
    """An embedding whose batch consists of a block for each layer, each block with its own learned rows.

    Args:
        base: the frozen embedding of the vocabulary.
        learned: (layers, n, hidden) embeddings of the ids that follow it.
    """

    def __init__(self, base: nn.Embedding, learned: Tensor) -> None:
        super().__init__()
        self.base = base
        self.learned = nn.Parameter(learned)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed (layers · batch, length) int64, layer by layer, as (layers · batch, length, hidden)."""
        size, count = self.base.num_embeddings, len(self.learned)
        layer = torch.arange(count, device=ids.device).repeat_interleave(len(ids) // count).unsqueeze(1)
        known = self.base(ids.clamp(max=size - 1))
        new = self.learned[layer, (ids - size).clamp(min=0)].to(known.dtype)
        return torch.where((ids >= size).unsqueeze(-1), new, known)


def cross_attentions(base: Base) -> list[nn.Module]:
    """List the U-Net's cross-attention layers, in the order of its modules: that of a token's embeddings."""
    if base.family.name != "sd":
        raise SboraError(
            f"embeddings for each layer are for Stable Diffusion 1.x and 2.x, got a {base.family.pipeline}",
            "train with --set layerwise_tokens=0",
        )
    return [module for name, module in base.pipeline.unet.named_modules() if name.split(".")[-1] == "attn2"]


@contextmanager
def layerwise_tokens(
    base: Base, embeddings: Mapping[str, Tensor], counts: Mapping[str, int]
) -> Iterator[dict[str, LayerwiseEmbedding]]:
    """Add tokens to the pipeline inside the context.

    Args:
        embeddings: "text_encoder.<token>" -> (layers · n, hidden), layer by layer; or (n, hidden) for all layers.
        counts: by the same names, layers; 0 for a token that is the same for all.

    Returns:
        The text encoder's extended embedding, as `added_tokens` does.

    Raises:
        SboraError: embeddings for another number of layers than the model has.
    """
    layers = cross_attentions(base)
    wrong = [token for token, count in counts.items() if count not in (0, len(layers))]
    if wrong:
        raise SboraError(f"{wrong[0]} has embeddings for {counts[wrong[0]]} layers, the model has {len(layers)}")
    blocks = {token: _by_layer(value, counts[token], len(layers)) for token, value in embeddings.items()}
    encoder: Any = base.pipeline.text_encoder
    with added_tokens(base, {token: block[0] for token, block in blocks.items()}) as plain, ExitStack() as stack:
        vocabulary = plain["text_encoder"].base
        learned = LayerwiseEmbedding(vocabulary, torch.cat(list(blocks.values()), dim=1).to(vocabulary.weight))
        encoder.set_input_embeddings(learned)
        hooks = [
            encoder.register_forward_pre_hook(partial(_repeat, len(layers)), with_kwargs=True),
            encoder.register_forward_hook(partial(_side_by_side, len(layers))),
        ]
        for number, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(partial(_take, number, len(layers)), with_kwargs=True))
        for hook in hooks:
            stack.callback(hook.remove)
        yield {"text_encoder": learned}


def _by_layer(value: Tensor, count: int, num_layers: int) -> Tensor:
    """Return (layers, n, hidden)."""
    return value.unflatten(0, (count, -1)) if count else value.expand(num_layers, *value.shape)


def _repeat(count: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Repeat the text encoder's batch `count` times."""

    def repeated(value: Any) -> Any:
        return value.repeat(count, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value

    return tuple(map(repeated, args)), {key: repeated(value) for key, value in kwargs.items()}


def _side_by_side(count: int, _: nn.Module, __: Any, output: Any) -> Any:
    """Convert (count · batch, length, hidden) to (batch, length, count · hidden)."""
    output["last_hidden_state"] = output[0].unflatten(0, (count, -1)).permute(1, 2, 0, 3).flatten(2)
    return output


def _take(number: int, count: int, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Give a cross-attention layer its own part."""
    return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].chunk(count, dim=-1)[number]}
