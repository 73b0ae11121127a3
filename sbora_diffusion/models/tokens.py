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
        """(batch, length) int64 to (batch, length, hidden)."""
        size = self.base.num_embeddings
        known = self.base(ids.clamp(max=size - 1))
        new = F.embedding((ids - size).clamp(min=0), self.learned).to(known.dtype)
        return torch.where((ids >= size).unsqueeze(-1), new, known)


def is_learned(base: Base, ids: Tensor) -> Tensor:
    """(n, tokens): which positions of the first text encoder's prompts are a learned token's."""
    vocabulary: Any = base.component(base.learners[0].component).get_input_embeddings()  # type: ignore[operator]
    return base.family.split(base.pipeline, ids)[0] >= vocabulary.base.num_embeddings


def class_embedding(base: Base, class_noun: str, count: int) -> dict[str, Tensor]:
    """Where a concept's token starts in each text encoder, (count, hidden): words that mean nothing, then the noun.

    The last row is the mean embedding of the noun's tokens, the others the mean of the vocabulary: they stand where
    adjectives do.
    """
    return {reader.component: _start(base, reader, class_noun, count) for reader in base.learners}


def _start(base: Base, reader: TextEncoderSpec, class_noun: str, count: int) -> Tensor:
    tokenizer = base.tokenizer(reader)
    ids = torch.tensor(tokenizer(class_noun, add_special_tokens=False).input_ids, device=base.device)
    if len(ids) == 0:
        raise SboraError(f"the class noun {class_noun!r} has no token in {base.id}", "choose a word, such as dog")
    encoder: Any = base.component(reader.component)
    vocabulary = encoder.get_input_embeddings()
    noun, nothing = vocabulary(ids).mean(0, keepdim=True), vocabulary.weight.mean(0, keepdim=True)
    return torch.cat([nothing.expand(count - 1, -1), noun]).detach()


@contextmanager
def added_tokens(base: Base, embeddings: Mapping[str, Tensor]) -> Iterator[dict[str, TokenEmbedding]]:
    """Add tokens to the pipeline, and leave tokenizers and encoders as they were at the end.

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
    names = [_numbered(token, number) for token, vectors in embeddings.items() for number in range(len(vectors))]
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


@lru_cache(maxsize=8)  # a copy takes longer than writing a concept's weights; nobody changes one once it is made
def _copy_with(tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...], size: int) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that knows the tokens, as the ids from `size` on."""
    known = tokenizer.get_vocab()
    taken = [name for name in names if name in known]
    if taken:
        raise SboraError(f"the base model knows the token {taken[0]} already", "choose another token")
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens([AddedToken(name, normalized=False) for name in names])  # as written: <Rex>, <Ünï>
    ids = copied.convert_tokens_to_ids(list(names))
    if ids != list(range(size, size + len(names))):
        raise SboraError(
            f"the tokenizer has {len(known)} entries, the text encoder {size}: they do not belong together"
        )
    return copied


def _numbered(token: str, number: int) -> str:
    return token if number == 0 else f"{token}_{number}"


REMEMBERED = 256  # captions


class TextEmbeddingCache:
    """Reads as `base.read` does while the text encoders are frozen: only captions with a learned token change.

    What is kept is read by itself, not in a batch, so that it is the same whenever it is read.

    Args:
        learns_token: whether the token's embeddings are trained; if not, every caption stays as it is.
    """

    def __init__(self, base: Base, learns_token: bool) -> None:
        self._base, self._learns_token = base, learns_token
        self._known: dict[bytes, TextConditioning] = {}

    def __call__(self, ids: Tensor) -> TextConditioning:
        """Token ids (n, length) to what the text encoders make of them."""
        changes = is_learned(self._base, ids).any(1) if self._learns_token else torch.zeros(len(ids), dtype=torch.bool)
        fresh = iter(_rows(self._base.encode_text(ids[changes])) if changes.any() else ())
        rows = [next(fresh) if new else self._remembered(row) for row, new in zip(ids, changes.tolist(), strict=True)]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return TextConditioning(torch.stack([row.states for row in rows]), torch.stack(pooled) if pooled else None)

    @torch.no_grad()
    def _remembered(self, ids: Tensor) -> TextConditioning:
        key = ids.cpu().numpy().tobytes()
        found = self._known.get(key) or _rows(self._base.encode_text(ids[None]))[0]
        self._known[key] = found
        if len(self._known) > REMEMBERED:
            self._known.pop(next(iter(self._known)))
        return found


def _rows(text: TextConditioning) -> list[TextConditioning]:
    pooled = [None] * len(text.states) if text.pooled is None else list(text.pooled)
    return [TextConditioning(states, summary) for states, summary in zip(text.states, pooled, strict=True)]
