"""Where a token's attention is, and who gets a place that several want."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from sbora_diffusion.inference.attention_maps import AttentionMaps, grid


@pytest.mark.parametrize(
    ("positions", "size", "expected"),
    [(64, (8, 8), (8, 8)), (16, (8, 8), (4, 4)), (6, (9, 5), (3, 2)), (1, (8, 8), (1, 1))],
)
def test_the_grid_of_a_layer(positions: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert grid(positions, size) == expected


@pytest.fixture
def attention() -> Attention:
    """Queries are the image's positions and keys the texts as they are."""
    layer = Attention(query_dim=4, cross_attention_dim=4, heads=2, dim_head=2)
    for part in (layer.to_q, layer.to_k):
        assert isinstance(part, nn.Linear)
        part.weight.data = 4 * torch.eye(4)
    return layer


def test_each_concept_where_its_token_is(attention: Attention) -> None:
    """Token 1 is sought by the left half, token 2 by the right one; row 0 of the batch does not count."""
    left, right = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.0, 1, 0, 1])
    image = torch.stack([left, left, right, right]).repeat(4, 1)  # 4 × 4 positions
    text = torch.stack([torch.zeros(4), left, right])
    maps = AttentionMaps({"rex": [1], "tom": [2]}, (8, 8))
    maps.renew()
    assert maps.mask("rex", 16) is None
    maps.observe(attention, torch.stack([-image, image]), torch.stack([text, text]), slice(1, 2))
    assert maps.mask("rex", 16) is None  # from the next step on
    maps.renew()
    rex, tom = maps.mask("rex", 16), maps.mask("tom", 16)
    assert rex is not None
    assert tom is not None
    assert rex.shape == tom.shape == (1, 16)
    rex, tom = rex.view(4, 4), tom.view(4, 4)
    assert (rex[:, 0] > 0.95).all()
    assert (rex[:, 3] < 0.05).all()
    torch.testing.assert_close(tom, rex.flip(1))
    assert maps.mask("kim", 16) is None


def test_one_concept_acts_fully_above_its_mean(attention: Attention) -> None:
    """Attention of 3:1 over two halves: 1 above the mean, its share of the mean below."""
    maps = AttentionMaps({"rex": [0]}, (2, 2))
    wanted = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    logits = (wanted / (1 - wanted)).log()  # of a softmax against a second token of zeros
    image = (logits / 16 / attention.scale).reshape(4, 1) * torch.tensor([1.0, 0, 1, 0])
    text = torch.tensor([[1.0, 0, 1, 0], [0.0, 0, 0, 0]])
    with torch.no_grad():
        maps.observe(attention, image[None], text[None], slice(None))
    maps.renew()
    found = maps.mask("rex", 4)
    assert found is not None
    torch.testing.assert_close(found.view(2, 2), torch.tensor([[1.0, 0.5], [1.0, 0.5]]))
