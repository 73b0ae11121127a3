"""Base models: what is adapted, how wide it is, when two of them are the same, and what cannot be loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from sbora_diffusion.diffusion.base import Base, load_base
from sbora_diffusion.diffusion.loading import full_name, recipe_base
from sbora_diffusion.errors import SboraError


def test_layers_are_the_attention_of_both_components(base: Base) -> None:
    assert set(base.layer_shapes) >= {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
    }
    assert not any("ff.net" in key or "mlp" in key for key in base.layers)
    assert base.width("fa") == base.width("fb") == 32
    assert base.resolution == 16


def test_everything_is_frozen(base: Base) -> None:
    pipeline = base.pipeline
    modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


def test_fingerprint_is_the_weights_not_the_file(base: Base, tiny_folder: Path, tmp_path: Path) -> None:
    half = StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float16, safety_checker=None)
    half.save_pretrained(tmp_path / "half")
    from_half = load_base(str(tmp_path / "half"))
    assert from_half.pipeline.unet.dtype == torch.float32
    assert from_half.fingerprint == base.fingerprint

    layer = from_half.layers["text_encoder.encoder.layers.0.self_attn.k_proj"]
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert Base("changed", from_half.pipeline).fingerprint != base.fingerprint


def test_the_embedded_base_model() -> None:
    base = load_base("emoji64")
    assert base.resolution == 64
    assert base.width("fa") == base.width("fb") == 128
    assert len(base.layers) == 72


def test_short_names_stand_for_hub_ids_unless_there_is_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert full_name("sdxl") == "stabilityai/stable-diffusion-xl-base-1.0"
    assert full_name("somebody/sdxl") == "somebody/sdxl"
    (tmp_path / "sdxl").mkdir()
    monkeypatch.chdir(tmp_path)
    assert full_name("sdxl") == "sdxl"


def test_recipes_are_chosen_by_family(tiny_folder: Path) -> None:
    assert recipe_base("emoji64") == "emoji64"
    assert recipe_base(str(tiny_folder)) == "sd"


def test_a_pipeline_of_no_known_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.30.0"}')
    with pytest.raises(SboraError, match="is a KandinskyPipeline, which no training is written for") as caught:
        load_base(str(tmp_path))
    assert "StableDiffusionXLPipeline" in (caught.value.hint or "")


def test_a_damaged_folder_says_what_is_damaged(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(SboraError, match=r"could not load base model .*config\.json"):
        load_base(str(folder))


def test_neither_folder_nor_model(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="could not load base model") as caught:
        load_base(str(tmp_path))
    assert caught.value.hint
