"""Files as other programs write them: other spellings, scales, dtypes and places of the token."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.utils.errors import SboraError

from .samples import SHAPES, random_adapter
from .written import BASE, contents, read, rewrite, write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_strangers(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounded, scaled by alpha, in other spellings, with the token beside it or bundled."""
    adapter = random_adapter(tokens={"<dog>": "dog"})
    expected = {key: factor.weight.to(dtype).float() / 2 for key, factor in adapter.factors.items()}
    *_, kohya, token = write(adapter, tmp_path / "k", "kohya")
    (diffusers, _), (config, *_) = write(adapter, tmp_path / "d", "diffusers"), write(adapter, tmp_path / "p", "peft")
    rounded = rewrite(kohya, lambda t: {k: v / 2 if k.endswith("alpha") else v.to(dtype) for k, v in t.items()})
    bundled = tmp_path / "dog-bundled.safetensors"
    vectors = contents(token)[1]["emb_params"]
    safetensors.torch.save_file(contents(rounded)[1] | {"bundle_emb.dog.string_to_param.*": vectors}, bundled)
    names = {"lora.down": "lora_A", "lora.up": "lora_B", "lora_linear_layer.down": "lora_A",
             "lora_linear_layer.up": "lora_B", "text_model.": ""}  # fmt: skip

    def respell(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        respelled = {}
        for key, tensor in tensors.items():
            for old, new in names.items():
                key = key.replace(old, new)
            respelled[key] = tensor.to(dtype)
        return respelled

    half = {f"{component}.{field}": value for component in ("unet", "text_encoder") for field, value in
            {"r": 3, "lora_alpha": 9, "alpha_pattern": {"to_k": 1.5, "^mid_block.attentions.0.transformer_blocks.0."
             "attn1.to_out.0": 1.5, "encoder.layers.0.self_attn.q_proj": 1.5}}.items()}  # fmt: skip
    rewrite(diffusers, respell, lora_adapter_metadata=json.dumps(half))
    fields = json.loads(config.read_bytes())
    for component in ("unet", "text_encoder"):
        (tmp_path / "p" / component / config.name).write_text(json.dumps(fields | {"lora_alpha": 1.5}))
        rewrite(tmp_path / "p" / component / "adapter_model.safetensors",
                lambda t: {k.replace(".weight", ".default.weight"): v.to(dtype) for k, v in t.items()})  # fmt: skip

    found = [read(rounded, SHAPES, token), read(bundled), read(diffusers, SHAPES, token)]
    found.append(read(tmp_path / "p", SHAPES, token))
    for got in found:
        assert (got.spec.side, got.spec.rank, got.spec.intervals) == ("fa", 3, (Interval(1, 3),))
        assert (got.spec.base_id, got.spec.base_fingerprint, got.spec.tokens) == (*BASE, {"<dog>": "dog"})
        assert torch.equal(got.tokens["text_encoder.<dog>"], vectors)
        for key, weight in expected.items():
            assert torch.equal(got.factors[key].index, adapter.factors[key].index)
            assert torch.equal(got.factors[key].weight, weight)


def test_rslora_and_a_single_peft_folder(tmp_path: Path) -> None:
    write(random_adapter(interval=Interval(0, 4)), tmp_path, "peft")
    folder = (tmp_path / "unet").rename(tmp_path / "anything")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4, "use_rslora": True}))
    rewrite(folder / "adapter_model.safetensors", lambda _: None)
    got = read(folder, name="cat")
    assert (got.spec.name, got.spec.tokens, len(got.factors)) == ("cat", {}, 2)
    for key, factor in got.factors.items():
        assert torch.equal(factor.weight, random_adapter(interval=Interval(0, 4)).factors[key].weight * 2)


def test_columns_of_a_strangers_choice(tmp_path: Path) -> None:
    adapter = random_adapter(tokens={})
    loras = write(adapter, tmp_path, "kohya")[0]

    def shift(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.roll(1, 1) if k.endswith("q_proj.lora_down.weight") else v for k, v in tensors.items()}

    got = read(rewrite(loras, shift))
    assert got.spec.intervals == ()
    key = "text_encoder.encoder.layers.0.self_attn.q_proj"
    assert torch.equal(got.factors[key].index, (adapter.factors[key].index + 1) % 8)
    assert got.spec.recipe == {"imported from": "dog.safetensors"}


def test_token_metadata_and_location(tmp_path: Path) -> None:
    *_, token = write(random_adapter(), tmp_path, "diffusers")
    flat = {"<sks>": torch.randn(8)}
    safetensors.torch.save_file(flat, tmp_path / "flat.safetensors")
    safetensors.torch.save_file({"emb_params": torch.randn(2, 8)}, tmp_path / "Some Cat.safetensors")
    got = read(tmp_path, SHAPES, tmp_path / "flat.safetensors", tmp_path / "Some Cat.safetensors")
    assert got.spec.tokens == {"<dog>": "hound", "<sks>": "sks", "<some-cat>": "some-cat"}
    assert torch.equal(got.tokens["text_encoder.<sks>"], flat["<sks>"].unsqueeze(0))
    assert read(tmp_path, SHAPES, tmp_path / "flat.safetensors", noun="mug").spec.tokens["<sks>"] == "mug"
    with pytest.raises(SboraError, match="the token '<dog>' is in two files"):
        read(tmp_path, SHAPES, token, token)
    token.unlink()
    with pytest.raises(SboraError, match="the token '<dog>' belongs to it, but is in none of the files"):
        read(tmp_path)
