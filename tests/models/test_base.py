"""Base models: what is adapted, how wide it is, when two of them are the same, and what cannot be loaded."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from sbora_diffusion.inference.bake import bake
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models import loading
from sbora_diffusion.models.base import Base, load_base, load_unplaced
from sbora_diffusion.models.families import FAMILIES, family_named
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.models.loading import full_name, recipe_base, usual_sampling
from sbora_diffusion.utils.errors import SboraError


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


def test_recipes_and_sampling_are_chosen_by_family(base: Base, tiny_folder: Path) -> None:
    assert recipe_base("emoji64") == "emoji64"
    assert recipe_base(str(tiny_folder)) == base.kind == "sd"
    assert usual_sampling("emoji64") == Sampling(steps=20, guidance=3.0)
    assert usual_sampling(str(tiny_folder)) == base.sampling == Sampling(steps=50, guidance=7.5)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_images_are_drawn_as_previews_are(kind: str) -> None:
    (family,) = (family for family in map(family_named, FAMILIES) if family.name == kind)
    recipe = configure(kind, "sbora-fa", {})
    assert family.sampling == Sampling(steps=recipe.output.sampling_steps, guidance=recipe.output.guidance)


def test_the_usual_sampling_is_what_nobody_asks_for(base: Base) -> None:
    def drawn(**how: Any) -> np.ndarray:
        return np.asarray(generate(base, ["a dog"], seeds=[1], **how)[0])

    assert np.array_equal(drawn(), drawn(steps=50, guidance=7.5))
    assert not np.array_equal(drawn(), drawn(steps=50, guidance=3.0))


def test_emoji64_with_concepts_baked_in_is_emoji64(base: Base, tmp_path: Path) -> None:
    emoji64 = load_base("emoji64")
    bake(emoji64, [], [], tmp_path / "first")
    bake(load_base(str(tmp_path / "first")), [], [], tmp_path / "second")
    for name in ("first", "second"):
        again = load_base(str(tmp_path / name))
        assert recipe_base(again.id) == again.kind == "emoji64"
        assert usual_sampling(again.id) == again.sampling == emoji64.sampling
    bake(base, [], [], tmp_path / "other")
    assert recipe_base(str(tmp_path / "other")) == "sd"
    for damaged in ("no JSON", "[]"):
        (tmp_path / "first" / "sbora.json").write_text(damaged)
        assert recipe_base(str(tmp_path / "first")) == "sd"


def test_a_pipeline_of_no_known_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.30.0"}')
    with pytest.raises(SboraError, match="class KandinskyPipeline, which cannot be trained") as caught:
        load_base(str(tmp_path))
    assert "StableDiffusionXLPipeline" in (caught.value.hint or "")


@pytest.mark.parametrize(("name", "hint"), [("sdlx", "did you mean sdxl"), ("sdxl", "load it once with a network")])
def test_what_helps_without_the_hub(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(loading, "hf_hub_download", unreachable)
    with pytest.raises(SboraError, match="could not load base model") as caught:
        load_base(name)
    assert str(caught.value.hint).startswith(hint)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(SboraError, match="could not load base model"):
        load_base(str(tmp_path))


def test_a_base_model_to_look_at_is_the_same(base: Base, tiny_folder: Path) -> None:
    seen = load_unplaced(str(tiny_folder))
    assert (seen.id, seen.fingerprint, seen.layer_shapes) == (base.id, base.fingerprint, base.layer_shapes)
    assert seen.device.type == "cpu"


def test_a_damaged_folder_says_what_is_damaged(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(SboraError, match=r"could not load base model .*config\.json"):
        load_base(str(folder))


def test_neither_folder_nor_model(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="could not load base model") as caught:
        load_base(str(tmp_path))
    assert caught.value.hint
