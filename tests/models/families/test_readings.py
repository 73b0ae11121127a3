"""Captions that a training cannot change are read once; what is learned is the same to the bit."""

from pathlib import Path

import pytest
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.methods.live import injected_concept
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models import tokens as readings
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.tokens import TextEmbeddingCache

from ...training.test_train import assert_same
from .conftest import SETTINGS, last_of, make_concept, tiny_base

FROZEN = SETTINGS | {"text_encoder_learning_rate": "0", "steps": "6"}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("token_rate", ["0.1", "0"])
def test_kept_or_read_again_the_same_is_learned(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_rate: str
) -> None:
    def trained(name: str) -> tuple[Adapter, int]:
        config = configure(base.family.name, "sbora-fa", FROZEN | {"token_learning_rate": token_rate})
        count = 0

        def counted(base: Base, ids: torch.Tensor) -> object:
            nonlocal count
            count += 1
            return base.family.encode_text(base.pipeline, ids)

        with monkeypatch.context() as patch:
            patch.setattr(Base, "encode_text", counted)
            return last_of(make_concept(tmp_path, "rex", "red"), base, Interval(0, 4), config, tmp_path / name), count

    kept, few = trained("kept")
    monkeypatch.setattr(readings, "CACHED", 0)
    again, many = trained("again")
    assert_same(kept, again)
    assert few < many


def test_read_as_the_base_model_reads(base: Base, tmp_path: Path) -> None:
    """Learned tokens get their gradients; each row is its own caption's."""
    config = configure(base.family.name, "sbora-fa", FROZEN)
    with injected_concept(make_concept(tmp_path, "rex", "red"), base, Interval(0, 4), config) as live:
        ids = base.tokenize(["a cat", "a <rex>", "", "a cat", "<rex> in the snow"])
        found, expected = TextEmbeddingCache(base, learns_token=True)(ids), base.encode_text(ids)
        torch.testing.assert_close(found.states, expected.states)
        assert (found.pooled is None) == (expected.pooled is None)
        if found.pooled is not None:
            torch.testing.assert_close(found.pooled, expected.pooled)
        found.states.sum().backward()
        assert all(rows.grad is not None and rows.grad.any() for rows in live.embeddings)
        assert not TextEmbeddingCache(base, learns_token=False)(ids).states.requires_grad
