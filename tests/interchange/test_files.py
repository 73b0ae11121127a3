"""Files of every format: written and read back bit for bit, read in others' spellings, and refused if hostile."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval, Side, Spec
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.adapters.merge import merge
from sbora_diffusion.interchange.exporting import FORMATS, base_model, export
from sbora_diffusion.interchange.importing import read_foreign, to_adapter
from sbora_diffusion.utils.errors import SboraError

from .samples import SDXL_SHAPES, SHAPES, assert_same, random_adapter

FAMILIES = {"sd": SHAPES, "sdxl": SDXL_SHAPES}
BASE = ("tiny", "f00d")
ONE = torch.ones(1)
Shapes = Mapping[str, tuple[int, int]]

each_format = pytest.mark.parametrize("to", FORMATS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def write(adapter: Adapter, folder: Path, to: str, shapes: Shapes = SHAPES, force: bool = False) -> list[Path]:
    return export(adapter, shapes, to, folder, resolution=512, date="2026-01-02T03:04:05+00:00", force=force)


def read(path: Path, shapes: Shapes = SHAPES, *embeddings: Path, name: str = "dog", noun: str = "") -> Adapter:
    return to_adapter(read_foreign(path, embeddings), shapes, BASE, name, noun)


def contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


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
        "ss_tag_frequency": '{"my dog (1)": {"<dog>": 1}}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "my dog (1)",
        "modelspec.resolution": "512x512",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.trigger_phrase": "<dog>",
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


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_has_provenance(tmp_path: Path, to: str) -> None:
    recipe = {"steps": 7, "learning_rate": 1e-3, "text_encoder_learning_rate": 1e-4, "seed": 3, "images": "abcd"}
    merged = random_adapter(recipe=recipe, parents=("rex", "tom"), tokens={"<rex>": "dog", "<tom>": "dog"})
    write(merged, tmp_path, to)
    file = {"diffusers": "pytorch_lora_weights", "kohya": "dog", "peft": "unet/adapter_model"}[to]
    metadata, _ = contents(tmp_path / f"{file}.safetensors")
    assert metadata["modelspec.trigger_phrase"] == "<rex>, <tom>"
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"<rex>": 1, "<tom>": 1}}
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


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any], **metadata: str) -> Path:
    """The file as a stranger would have written it, without our metadata."""
    tensors = contents(path)[1]
    changed = change(tensors) or tensors
    safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in changed.items()}, path, metadata)
    return path


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
    assert got.spec.tokens == {"<dog>": "hound", "<sks>": "sks", "<Some Cat>": "Some Cat"}
    assert torch.equal(got.tokens["text_encoder.<sks>"], flat["<sks>"].unsqueeze(0))
    assert read(tmp_path, SHAPES, tmp_path / "flat.safetensors", noun="mug").spec.tokens["<sks>"] == "mug"
    with pytest.raises(SboraError, match="the token '<dog>' is in two files"):
        read(tmp_path, SHAPES, token, token)
    token.unlink()
    with pytest.raises(SboraError, match="the token '<dog>' belongs to it, but is in none of the files"):
        read(tmp_path)


def edit_config(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "unet/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))

    return edit


def edit_file(pattern: str, change: Callable[[dict[str, Tensor]], Any], **metadata: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        rewrite(next(folder.glob(pattern)), change, **metadata)

    return edit


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def mapped(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: {key: change(t) if key.endswith(end) else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("to", "damage", "message"),
    [
        ("peft", edit_config(peft_type="LOHA"), "of type 'LOHA', expected a LoRA"),
        ("peft", edit_config(use_dora=True), "made with use_dora"),
        ("peft", edit_config(bias="all"), "made with bias 'all'"),
        ("peft", edit_config(lora_alpha="x"), "alpha of layer .* is 'x'"),
        ("peft", edit_config(lora_alpha=float("inf")), "is inf, expected a number"),
        ("peft", edit_config(alpha_pattern={"(a+)+$": 1}), "the regular expression"),
        ("peft", edit_config(alpha_pattern=[1]), "alpha_pattern is list"),
        ("peft", lambda f: (f / "unet/adapter_config.json").write_text("{"), "cannot be read as JSON"),
        ("peft", lambda f: (f / "unet/adapter_config.json").write_text("[" * 10**5), "cannot be read as JSON"),
        ("peft", lambda f: (f / "unet/adapter_model.safetensors").unlink(), "no such file"),
        ("peft", lambda f: (f / "unet").rename(f / "text_encoder_2"), "which the base model does not have"),
        ("kohya", edit_file("*.saf*", renamed("lora_down.weight", "dora_scale")), "belongs to no plain LoRA"),
        ("kohya", edit_file("*.saf*", renamed("lora_unet", "lora_\x1b[31m")), r"'lora_\\x1b\[31m.*no plain LoRA"),
        ("kohya", edit_file("*.saf*", renamed("attn2_to_k", "ff_net_2")), "which the base model does not have"),
        ("kohya", edit_file("*.saf*", lambda t: {k: v for k, v in t.items() if "up" not in k}), "lacks its up factor"),
        ("kohya", edit_file("*.saf*", lambda t: {"a.alpha": torch.ones(())} | t), "layer a lacks its down and up"),
        ("kohya", edit_file("*.saf*", lambda _: dict.fromkeys(("a.lora_A.weight", "a.lora.down.weight"), ONE)),
         "layer a has two down factors"),
        ("kohya", edit_file("*.saf*", lambda _: {"bundle_emb.x.clip_x": ONE}), "no LoRA layer|the embedding"),
        ("kohya", edit_file("*.saf*", lambda t: t | {"bundle_emb.x.clip_x": ONE}), "has the embedding"),
        ("kohya", edit_file("*.saf*", mapped("alpha", lambda _: torch.ones(2))), "alpha of layer .* has 2 values"),
        ("kohya", edit_file("*.saf*", mapped("alpha", lambda _: torch.tensor(torch.nan))), "has the scale nan"),
        ("kohya", edit_file("*.saf*", mapped("up.weight", lambda t: t * torch.inf)), "not finite"),
        ("kohya", edit_file("*.saf*", mapped("up.weight", lambda t: t[:, :2])), "the ranks 3"),
        ("kohya", edit_file("*.saf*", mapped("up.weight", lambda t: t[1:])), "of 11×8, the base model has 12×8"),
        ("kohya", edit_file("*.saf*", mapped("down.weight", lambda t: t[:, :, None, None])), "linear layers only"),
        ("kohya", edit_file("*.saf*", mapped("down.weight", lambda t: t.to(torch.complex64))), "dtype torch.complex64"),
        ("kohya", edit_file("*.saf*", mapped("down.weight", torch.randn_like)), "is a dense LoRA"),
        ("kohya", edit_file("*.saf*", lambda _: {"a": ONE}), "'a', which belongs to no plain LoRA"),
        ("kohya", edit_file("*.saf*", lambda _: None, **{"sbora.spec": "{}"}), "metadata must have exactly the keys"),
        ("kohya", lambda f: next(f.glob("*.saf*")).write_bytes(b"\x80\x02pickle"), "cannot be read as safetensors"),
        ("kohya", lambda f: (f / "second.safetensors").touch(), "has 2 safetensors files, expected one"),
        ("kohya", edit_file("emb*/*", mapped("emb_params", lambda t: t[:, :5])), "has vectors of width 5"),
        ("kohya", edit_file("emb*/*", mapped("emb_params", lambda t: t * torch.nan)), "'<dog>': some values are not"),
        ("kohya", edit_file("emb*/*", mapped("emb_params", lambda t: t.int())), "'<dog>': got torch.int32"),
        ("kohya", edit_file("emb*/*", renamed("emb_params", "clip_g")), "it has none"),
        ("kohya", edit_file("emb*/*", lambda t: t | {"clip_l": torch.ones(1, 8)}), "two embeddings for one text"),
        ("kohya", edit_file("emb*/*", lambda _: {"a": ONE, "b": ONE}), "has 2 keys, expected one"),
        ("kohya", lambda f: (f / "embeddings/dog.safetensors").write_bytes(b""), "cannot be read as safetensors"),
        ("diffusers", edit_file("*.saf*", lambda _: None, lora_adapter_metadata="{"), "is not JSON"),
        ("diffusers", edit_file("*.saf*", lambda _: None, lora_adapter_metadata="[]"), "is list, expected an object"),
        ("diffusers", edit_file("*.saf*", lambda _: None, lora_adapter_metadata='{"unet.use_dora": 1}'), "use_dora"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path: Path, to: str, damage: Callable[[Path], Any], message: str) -> None:
    write(random_adapter(), tmp_path, to)
    damage(tmp_path)
    with pytest.raises(SboraError, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match="no such file"):
        read(tmp_path / "nothing.safetensors")
    with pytest.raises(SboraError, match="has 0 safetensors files"):
        read(tmp_path)


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_is_reported_or_harmless(tmp_path: Path, seed: int) -> None:
    """Any byte anywhere may be another one, and any tail may be missing."""
    chance = random.Random(seed)
    write(random_adapter(), tmp_path, FORMATS[seed % 3])
    path = chance.choice(sorted(path for path in tmp_path.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(min(len(content), 400))] = chance.randrange(256)
    path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
    try:
        adapter = read(tmp_path)
        adapter.save(tmp_path / "saved.safetensors")
    except SboraError:
        return
    assert_same(Adapter.load(tmp_path / "saved.safetensors"), adapter)
