"""Learned tokens: read where their ids are, gone without a trace afterwards."""

import pytest
import torch

from sbora_diffusion.models.base import Base
from sbora_diffusion.models.tokens import added_tokens, class_embedding
from sbora_diffusion.utils.errors import SboraError


def embed(base: Base, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return base.pipeline.text_encoder.get_input_embeddings()(base.tokenize([prompt]))[0]


def test_token_reads_its_embedding_and_nothing_else_changes(base: Base) -> None:
    before, vocabulary = embed(base, "a dog"), base.pipeline.text_encoder.get_input_embeddings()
    learned = torch.full((1, 32), 7.0)
    with added_tokens(base, {"text_encoder.<rex>": learned}):
        assert torch.equal(embed(base, "a dog"), before)
        assert torch.equal(embed(base, "a <rex>")[2], learned[0])
        assert torch.equal(embed(base, "a <rex>")[:2], before[:2])
    assert base.pipeline.text_encoder.get_input_embeddings() is vocabulary
    assert "<rex>" not in base.pipeline.tokenizer.get_vocab()
    assert torch.equal(embed(base, "a dog"), before)


def test_the_same_token_again_with_another_embedding(base: Base) -> None:
    for value in (1.0, 2.0):
        learned = torch.full((1, 32), value)
        with added_tokens(base, {"text_encoder.<rex>": learned}):
            assert torch.equal(embed(base, "a <rex>")[2], learned[0])
        assert "<rex>" not in base.pipeline.tokenizer.get_vocab()


def test_several_tokens_of_several_vectors(base: Base) -> None:
    first, second = torch.randn(2, 32), torch.randn(1, 32)
    with added_tokens(base, {"text_encoder.<rex>": first, "text_encoder.<tom>": second}):
        rows = embed(base, "<tom> <rex>")
    assert torch.equal(rows[1:4], torch.cat([second, first]))


def test_only_the_token_gets_a_gradient(base: Base) -> None:
    with added_tokens(base, {"text_encoder.<rex>": torch.zeros(1, 32)}) as extended:
        base.pipeline.text_encoder(base.tokenize(["a <rex> here"])).last_hidden_state.sum().backward()
        embedding = extended["text_encoder"]
        assert embedding.learned.grad is not None
        assert embedding.learned.grad.abs().sum() > 0
        assert embedding.base.weight.grad is None


def test_a_known_word_is_refused(base: Base) -> None:
    vocabulary = base.pipeline.text_encoder.get_input_embeddings()
    with (
        pytest.raises(SboraError, match="knows the token a already"),
        added_tokens(base, {"text_encoder.a": torch.zeros(1, 32)}),
    ):
        pass
    assert base.pipeline.text_encoder.get_input_embeddings() is vocabulary


def test_a_token_starts_as_words_without_meaning_and_its_class_noun(base: Base) -> None:
    noun = embed(base, "ab")[1:3].mean(0, keepdim=True)
    torch.testing.assert_close(class_embedding(base, "ab", 1)["text_encoder"], noun)
    start = class_embedding(base, "ab", 3)["text_encoder"]
    torch.testing.assert_close(start[2:], noun)
    mean = base.pipeline.text_encoder.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(start[:2], mean.expand(2, -1))
    with pytest.raises(SboraError, match="class noun"):
        class_embedding(base, " ", 1)
