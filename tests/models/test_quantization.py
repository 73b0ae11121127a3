"""4-bit layers on CPUs with AVX512-BF16, where bitsandbytes repacks weights in evaluation mode."""

from pathlib import Path
from typing import Any

import bitsandbytes.nn.modules as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit

from sbora_diffusion.adapters.layer import keep_linear4bit_unpacked
from sbora_diffusion.models.base import load_base
from sbora_diffusion.models.quantization import to_nf4

from ..tiny_transformers import save_tiny_flux, save_tiny_sd3


@pytest.fixture
def repacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CPU has AVX512-BF16; repacking fails as it does for layers of some widths."""

    def fail(*_: Any) -> None:
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb, "_convert_weight_packed_for_cpu", fail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="4-bit layers are on the GPU there")
@pytest.mark.parametrize("save", [save_tiny_flux, save_tiny_sd3])
@pytest.mark.usefixtures("repacks")
def test_no_layer_of_a_loaded_pipeline_is_repacked(save: Any, tmp_path: Path) -> None:
    base = load_base(str(save(tmp_path / "base")), "nf4")
    encoders = [base.component(reader.component) for reader in base.family.present(base.pipeline)]
    packed = [
        layer for model in (*encoders, base.denoiser) for layer in model.modules() if isinstance(layer, Linear4bit)
    ]
    assert any(layer in set(encoder.modules()) for encoder in encoders for layer in packed)
    with torch.no_grad():
        assert base.encode_text(base.tokenize(["a cat"])).states.isfinite().all()
        for layer in packed:
            layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="4-bit layers are on the GPU there")
@pytest.mark.usefixtures("repacks")
def test_without_the_guard_it_would_be(tmp_path: Path) -> None:
    model = load_base(str(save_tiny_flux(tmp_path / "base")), "bf16").denoiser
    to_nf4(model)
    model.to("cpu")
    layer = next(layer for layer in model.modules() if isinstance(layer, Linear4bit))
    inputs = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(AssertionError, match="block_n"):
        layer(inputs)
    keep_linear4bit_unpacked(model)
    with torch.no_grad():
        assert layer(inputs).isfinite().all()
