"""Learned tokens beside the text encoders' vocabularies, which themselves are never touched."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizerBase

from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import TextConditioning, TextEncoderSpec
from sbora_diffusion.utils.errors import SboraError


class TokenEmbedding(nn.Module):
    """An embedding whose last rows are learned: ids from `base.num_embeddings` on read `learned`.

    Args:
        base: the frozen embedding of the vocabulary.
        learned: (n, hidden) embeddings of the ids that follow it.
    """

    def __init__(self, base: nn.Embedding, learned: Tensor) -> None:
        super().__init__()
        self.base = base
        self.learned = nn.Parameter(learned)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed (batch, length) int64 as (batch, length, hidden)."""
        size = self.base.num_embeddings
        known = self.base(ids.clamp(max=size - 1))
        new = F.embedding((ids - size).clamp(min=0), self.learned).to(known.dtype)
        return torch.where((ids >= size).unsqueeze(-1), new, known)


def is_learned(base: Base, ids: Tensor) -> Tensor:
    """Return (n, tokens): which positions of the first text encoder's prompts are a learned token's."""
    vocabulary: Any = base.component(base.learners[0].component).get_input_embeddings()  # type: ignore[operator]
    return base.family.split(base.pipeline, ids)[0] >= vocabulary.base.num_embeddings


def class_embedding(base: Base, class_noun: str, count: int) -> dict[str, Tensor]:
    """Return the initial embeddings of a concept's token in each text encoder, (count, hidden).

    The last row is the mean embedding of the noun's tokens; the others, before it like adjectives, that of the
    vocabulary.
    """
    start = {}
    for reader in base.learners:
        ids = torch.tensor(base.tokenizer(reader)(class_noun, add_special_tokens=False).input_ids, device=base.device)
        if len(ids) == 0:
            raise SboraError(f"the class noun {class_noun!r} has no token in {base.id}", "choose a word, such as dog")
        encoder: Any = base.component(reader.component)
        vocabulary = encoder.get_input_embeddings()
        noun, neutral = vocabulary(ids).mean(0, keepdim=True), vocabulary.weight.mean(0, keepdim=True)
        start[reader.component] = torch.cat([neutral.expand(count - 1, -1), noun]).detach()
    return start


@contextmanager
def added_tokens(base: Base, embeddings: Mapping[str, Tensor]) -> Iterator[dict[str, TokenEmbedding]]:
    """Add tokens to the pipeline's tokenizers and text encoders inside the context.

    A token of several vectors occupies several ids, `<dog>`, `<dog>_1` …, as diffusers' textual inversion does; the
    pipeline's own prompt conversion expands it.

    Args:
        embeddings: "<component>.<token>" -> (n, hidden), such as "text_encoder.<dog>".

    Returns:
        The extended embedding of each text encoder that has one.
    """
    by_component: dict[str, dict[str, Tensor]] = {}
    for key, vectors in embeddings.items():
        component, _, token = key.partition(".")
        by_component.setdefault(component, {})[token] = vectors
    readers = {reader.component: reader for reader in base.learners}
    foreign = sorted(by_component.keys() - readers)
    if foreign:
        raise SboraError(f"a token is for the component {foreign[0]}, {base.id} learns them in {', '.join(readers)}")
    with ExitStack() as stack:
        yield {
            component: stack.enter_context(_extended(base, readers[component], own))
            for component, own in by_component.items()
        }


@contextmanager
def _extended(base: Base, reader: TextEncoderSpec, embeddings: Mapping[str, Tensor]) -> Iterator[TokenEmbedding]:
    encoder: Any = base.component(reader.component)
    vocabulary, before = encoder.get_input_embeddings(), base.tokenizer(reader)
    names = [f"{token}_{n}" if n else token for token, vectors in embeddings.items() for n in range(len(vectors))]
    extended_tokenizer = _copy_with(before, tuple(names), vocabulary.num_embeddings)
    rows = torch.cat([vectors.to(vocabulary.weight) for vectors in embeddings.values()])
    extended = TokenEmbedding(vocabulary, rows.clone())
    setattr(base.pipeline, reader.tokenizer, extended_tokenizer)
    encoder.set_input_embeddings(extended)
    try:
        yield extended
    finally:
        encoder.set_input_embeddings(vocabulary)
        setattr(base.pipeline, reader.tokenizer, before)


@lru_cache(maxsize=8)  # a copy takes longer than writing a concept's weights
def _copy_with(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...], size: int) -> PreTrainedTokenizerBase:
    """Copy the tokenizer and add the tokens as the ids from `size` on."""
    known = tokenizer.get_vocab()
    taken = [name for name in names if name in known]
    if taken:
        raise SboraError(f"the base model knows the token {taken[0]} already", "choose another token")
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens([AddedToken(name, normalized=False) for name in names])  # as written: <Rex>, <Ünï>
    ids = copied.convert_tokens_to_ids(list(names))
    if ids != list(range(size, size + len(names))):
        raise SboraError(f"got a tokenizer of {len(known)} entries for a text encoder of {size}, expected as many")
    return copied


CACHED = 256  # captions


class TextEmbeddingCache:
    """Encode text as `base.encode_text` does, caching what frozen text encoders make of each caption.

    A caption is encoded separately, not in a batch, so that its encoding does not depend on the others.

    Args:
        learns_token: whether the token's embeddings are trained, so that captions with it are not cached.
    """

    def __init__(self, base: Base, learns_token: bool) -> None:
        self._base, self._learns_token = base, learns_token
        self._known: dict[bytes, TextConditioning] = {}

    def __call__(self, ids: Tensor) -> TextConditioning:
        """Encode token ids (n, length)."""
        changes = is_learned(self._base, ids).any(1) if self._learns_token else torch.zeros(len(ids), dtype=torch.bool)
        fresh = iter(_rows(self._base.encode_text(ids[changes])) if changes.any() else ())
        rows = [next(fresh) if new else self._cached(row) for row, new in zip(ids, changes.tolist(), strict=True)]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextConditioning(torch.stack([row.states for row in rows]), torch.stack(pooled) if pooled else None)

    @torch.no_grad()
    def _cached(self, ids: Tensor) -> TextConditioning:
        key = ids.cpu().numpy().tobytes()
        found = self._known.get(key) or _rows(self._base.encode_text(ids[None]))[0]
        self._known[key] = found
        if len(self._known) > CACHED:
            self._known.pop(next(iter(self._known)))
        return found


def _rows(text: TextConditioning) -> list[TextConditioning]:
    pooled = [None] * len(text.states) if text.pooled is None else list(text.pooled)
    return [TextConditioning(states, summary) for states, summary in zip(text.states, pooled, strict=True)]
