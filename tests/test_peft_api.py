"""`sbora.peft`: SBoRA on anybody's PEFT model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import sbora_diffusion as sbora


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))


def train_steps(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("side", ["fa", "fb"])
def test_a_sbora_model_trains_its_columns_or_rows_and_saves_as_plain_peft(tmp_path: Path, side: Any) -> None:
    x, plain = torch.randn(5, 12), network()
    model = sbora.peft.get_sbora_model(network(), rank=2, side=side, start=4, target_modules=["0", "2"], lora_alpha=4)
    assert torch.equal(model(x), plain(x))
    layers = sbora.peft.detect(model, "default")
    assert sorted(layers) == ["0", "2"]
    assert {layer.side for layer in layers.values()} == {side}
    train_steps(model, x)
    merged = model.get_base_model()
    changed = {name: layer.delta() for name, layer in layers.items()}
    assert all(delta.abs().sum() > 0 for delta in changed.values())
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(network(), str(tmp_path / "saved"))
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(loaded(x), plain(x))
    assert merged is model.get_base_model()


def test_disjoint_adapters_write_different_columns() -> None:
    indices = []
    for start in (0, 4):
        model = sbora.peft.get_sbora_model(network(), rank=4, start=start, target_modules=["0"], adapter_name="own")
        indices.append({*sbora.peft.detect(model, "own")["0"].index.tolist()})
    assert not indices[0] & indices[1]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"lora_alhpa": 3}, "'lora_alhpa'", "did you mean lora_alpha"),
        ({"use_dora": True}, "'use_dora'", "allowed are rank, side, start"),
        ({"r": 3}, "'r'", "allowed are rank, side, start"),
        ({"side": "columns"}, "got side='columns', expected 'fa'", None),
        ({"rank": 13}, "interval 0:13 does not fit layer 0", None),
        ({"start": -1}, "is empty or negative", None),
    ],
)
def test_get_sbora_model_refuses(arguments: dict[str, Any], message: str, hint: str | None) -> None:
    model = network()
    with pytest.raises(sbora.SboraError, match=message) as raised:
        sbora.peft.get_sbora_model(model, **{"target_modules": ["0"], "rank": 2, **arguments})
    assert hint is None or hint in str(raised.value.hint)
    assert type(next(model.children())) is nn.Linear  # nothing is left behind
