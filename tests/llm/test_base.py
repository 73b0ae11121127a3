"""Loading a base model: one fingerprint and plain transformers' outputs in every type; errors."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sbora_diffusion.llm.base import fingerprint, load_base
from sbora_diffusion.utils.errors import SboraError

from .tiny import tokenizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def saved(request: pytest.FixtureRequest, base: str, tmp_path: Path) -> str:
    """Save the base model in a type."""
    AutoModelForCausalLM.from_pretrained(base, dtype=request.param).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_one_fingerprint_in_every_type(saved: str) -> None:
    plain, nf4 = (
        {fingerprint(load_base(saved, dtype, quantize)[0]) for dtype in (*DTYPES, "auto")}
        for quantize in ("none", "nf4")
    )
    assert (len(plain), len(nf4), plain & nf4) == (1, 1, set())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_matches_plain_transformers(saved: str, dtype: torch.dtype) -> None:
    model, _ = load_base(saved, dtype)
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    assert model.config.dtype == plain.config.dtype == dtype
    for got, expected in ((model.named_parameters, plain.named_parameters), (model.named_buffers, plain.named_buffers)):
        assert {name: (tensor.dtype, tensor.double().sum()) for name, tensor in got()} == {
            name: (tensor.dtype, tensor.double().sum()) for name, tensor in expected()
        }
    inputs = torch.arange(3, 20)[None]
    assert torch.equal(model(inputs).logits, plain(inputs).logits)


def test_nf4_computes_in_the_requested_type(saved: str) -> None:
    model, _ = load_base(saved, quantize="nf4")
    layer = model.model.layers[0].self_attn.q_proj
    assert model(torch.arange(3, 20)[None]).logits.dtype == torch.float32
    assert layer.weight.quant_state.dtype == model.model.norm.weight.dtype == torch.float32


def test_no_bitsandbytes(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SboraError, match="nf4 needs bitsandbytes"):
        load_base(base, quantize="nf4")


def test_gated_model(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr("sbora_diffusion.llm.base.AutoModelForCausalLM.from_pretrained", refuse)
    monkeypatch.setattr("sbora_diffusion.utils.hub.can_be_reached", lambda: True)
    with pytest.raises(SboraError, match="gated repo") as caught:
        load_base(base)
    assert "Accept its licence" in str(caught.value.hint)
