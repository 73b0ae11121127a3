"""Files of every format: what is exported, and that it comes back bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sbora_diffusion.adapters.basis import Interval, Side, Spec
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.interchange.exporting import FORMATS, base_model, provenance
from sbora_diffusion.interchange.files import diffusers_file, read_loras
from sbora_diffusion.interchange.lora import Lora
from sbora_diffusion.utils.errors import SboraError

from .samples import SDXL_SHAPES, SHAPES, assert_same, random_adapter
from .written import contents, read, write

FAMILIES = {"sd": SHAPES, "sdxl": SDXL_SHAPES}

each_format = pytest.mark.parametrize("to", FORMATS)

each_family = pytest.mark.parametrize("family", FAMILIES)


@each_format
@each_family
@pytest.mark.parametrize("side", ["fa", "fb"])
def test_round_trip(tmp_path: Path, to: str, family: str, side: Side) -> None:
    adapter = random_adapter(FAMILIES[family], side, vectors=2)
    paths = write(adapter, tmp_path, to, FAMILIES[family])
    assert sorted(paths) == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert tmp_path / "embeddings/dog.safetensors" in paths
    assert_same(read(tmp_path, FAMILIES[family]), adapter)
    lora = next(path for path in paths if path.parent == tmp_path or to == "peft")
    assert_same(read(lora if to != "peft" else tmp_path, FAMILIES[family]), adapter)


@each_format
def test_round_trip_of_a_merge_whose_layers_have_different_ranks(tmp_path: Path, to: str) -> None:
    few = dict(list(SHAPES.items())[:2])
    dog = random_adapter(SHAPES, interval=Interval(0, 2))
    cat = random_adapter(few, interval=Interval(4, 3), seed=1, name="cat", tokens={"<cat>": "cat"})
    cat = replace(cat, tokens={"text_encoder.<cat>": torch.randn(1, 8)})
    merged = merge([dog, cat], [1.0, -0.7], "sum")
    paths = write(merged, tmp_path, to)
    assert {path.name for path in paths if path.parent.name == "embeddings"} == {"dog.safetensors", "cat.safetensors"}
    assert_same(read(tmp_path, name="cat+dog"), merged)


@each_format
def test_the_same_bytes_again(tmp_path: Path, to: str) -> None:
    first, second = (write(random_adapter(), tmp_path / name, to) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_diffusers_file(tmp_path: Path) -> None:
    write(random_adapter(), tmp_path, "diffusers")
    metadata, tensors = contents(tmp_path / "pytorch_lora_weights.safetensors")
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert tuple(tensors[f"{attention}.lora.down.weight"].shape) == (3, 16)
    assert tuple(tensors[f"{text}.lora_linear_layer.up.weight"].shape) == (12, 3)
    assert len(tensors) == 2 * len(SHAPES)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (metadata["format"], config["unet.r"], config["text_encoder.lora_alpha"]) == ("pt", 3, 3)
    assert contents(tmp_path / "embeddings/dog.safetensors")[1].keys() == {"<dog>"}


def test_a_kohya_file(tmp_path: Path) -> None:
    write(random_adapter(SDXL_SHAPES, name="my dog (1)"), tmp_path, "kohya", SDXL_SHAPES)
    metadata, tensors = contents(tmp_path / "my-dog-1.safetensors")
    assert len(tensors) == 3 * len(SDXL_SHAPES)
    assert all(tensor == 3 for key, tensor in tensors.items() if key.endswith(".alpha"))
    assert {key: value for key, value in metadata.items() if key != "sbora.spec"} == {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "ss_sd_model_name": "tiny",
        "ss_sd_model_hash": "f00d",
        "ss_output_name": "my dog (1)",
        "ss_resolution": "(512, 512)",
        "ss_steps": "7",
        "ss_tag_frequency": '{"my dog (1)": {"dog": 1}}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "my dog (1)",
        "modelspec.resolution": "512x512",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.trigger_phrase": "dog",
        "modelspec.tags": "hound",
    }
    pair = contents(tmp_path / "embeddings/dog.safetensors")[1]
    assert {key: tuple(tensor.shape) for key, tensor in pair.items()} == {"clip_l": (1, 8), "clip_g": (1, 14)}


CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"

JOINT = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("shapes", "resolution", "version", "architecture"),
    [
        ({CROSS: (8, 768)}, 512, "sd_v1", "stable-diffusion-v1"),
        ({CROSS: (8, 1024)}, 512, "sd_v2", "stable-diffusion-v2-512"),
        ({CROSS: (8, 1024)}, 768, "sd_v2", "stable-diffusion-v2-768-v"),
        (SDXL_SHAPES, 1024, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        ({JOINT: (8, 8), "text_encoder_2.encoder.layers.0.q_proj": (8, 8)}, 1024, "sd3", "stable-diffusion-3"),
        ({JOINT: (8, 8), "text_encoder.encoder.layers.0.q_proj": (8, 8)}, 1024, "flux1", "flux-1-dev"),
    ],
)
def test_base_model_metadata(
    shapes: dict[str, tuple[int, int]], resolution: int, version: str, architecture: str
) -> None:
    assert base_model(shapes, resolution) == (version, architecture)
    spec = random_adapter().spec
    metadata = provenance(spec, shapes, 1, resolution, "2026-01-02", kohya=True)
    assert metadata.get("ss_v2") == ("True" if version == "sd_v2" else None)


def test_transformers_have_the_names_of_peft() -> None:
    lora = Lora(torch.zeros(1, 8), torch.zeros(8, 1), 1.0)
    tensors, _ = diffusers_file({JOINT: lora}, {})
    assert tensors.keys() == {f"{JOINT}.lora_A.weight", f"{JOINT}.lora_B.weight"}
    assert read_loras(tensors, {}).keys() == {JOINT}


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_has_provenance(tmp_path: Path, to: str) -> None:
    recipe = {"steps": 7, "learning_rate": 1e-3, "text_encoder_learning_rate": 1e-4, "seed": 3, "images": "abcd"}
    merged = random_adapter(recipe=recipe, parents=("rex", "tom"), tokens={"<rex>": "dog", "<tom>": "dog"})
    write(merged, tmp_path, to)
    file = {"diffusers": "pytorch_lora_weights", "kohya": "dog", "peft": "unet/adapter_model"}[to]
    metadata, _ = contents(tmp_path / f"{file}.safetensors")
    words = ["rex", "tom"] if to == "kohya" else ["<rex>", "<tom>"]  # A1111's word is the name of the token's file
    assert metadata["modelspec.trigger_phrase"] == ", ".join(words)
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": dict.fromkeys(words, 1)}
    assert (metadata["modelspec.tags"], metadata["modelspec.merged_from"]) == ("dog", "rex, tom")
    rates = [metadata[key] for key in ("ss_unet_lr", "ss_text_encoder_lr", "ss_seed", "ss_steps")]
    assert rates == ["0.001", "0.0001", "3", "7"]
    spec = Spec.from_json(metadata["sbora.spec"])
    assert (spec.base_fingerprint, spec.recipe["images"]) == ("f00d", "abcd")


def test_a_peft_folder(tmp_path: Path) -> None:
    write(random_adapter(), tmp_path, "peft")
    config = json.loads((tmp_path / "unet/adapter_config.json").read_bytes())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 3, 3, "none")
    assert config["init_lora_weights"] is True
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    _, tensors = contents(tmp_path / "text_encoder/adapter_model.safetensors")
    layer = "base_model.model.encoder.layers.0.self_attn.q_proj"
    assert tensors.keys() == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}


def test_kohya_embeddings_and_how_tokens_are_named(tmp_path: Path) -> None:
    adapter = random_adapter(tokens={"<my dog>": "dog", "<a+b>": "cat"})
    write(adapter, tmp_path, "kohya")
    metadata, tensors = contents(tmp_path / "embeddings/my-dog.safetensors")
    assert tensors.keys() == {"emb_params"}
    assert metadata == {"format": "pt", "sbora.token": "<my dog>", "sbora.noun": "dog"}
    assert (tmp_path / "embeddings/a+b.safetensors").exists()
    with pytest.raises(SboraError, match="two tokens would be written to embeddings/dog"):
        write(random_adapter(tokens={"<dog>": "dog", "dog": "dog"}), tmp_path / "other", "kohya")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write(random_adapter(), tmp_path, "kohya")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(SboraError, match=r"dog\.safetensors exists"):
        write(random_adapter(seed=1), tmp_path, "kohya")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    write(random_adapter(seed=1), tmp_path, "kohya", force=True)
    assert_same(read(tmp_path), random_adapter(seed=1))


def test_formats_that_cannot_hold_it(tmp_path: Path) -> None:
    llm = {"model.model.layers.0.mlp.up_proj": (6, 8)}
    for to in ("kohya", "diffusers"):
        with pytest.raises(SboraError, match="belongs to a model, this format is for unet") as caught:
            write(random_adapter(llm, tokens={}), tmp_path, to, llm)
        assert caught.value.hint == "Export to peft."
    write(random_adapter(llm, tokens={}), tmp_path, "peft", llm)
    assert json.loads((tmp_path / "model/adapter_config.json").read_bytes())["task_type"] == "CAUSAL_LM"
    assert_same(read(tmp_path, llm), random_adapter(llm, tokens={}))
    with pytest.raises(SboraError, match="got format 'onnx', expected one of diffusers, kohya, peft"):
        write(random_adapter(), tmp_path, "onnx")
