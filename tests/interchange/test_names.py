"""Names in other programs' files, against the rules that those programs have published."""

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sbora_diffusion.interchange.names import diffusers_name, kohya_name, peft_name, resolve
from sbora_diffusion.utils.errors import SboraError

from .samples import SDXL_SHAPES, SHAPES, layer_shapes

BLOCKS = {  # of the real U-Nets: which blocks have attentions
    "sd": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "sdxl": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}
DEPTHS = {"sd": (1, 1, 1, 1), "sdxl": (1, 2, 10)}


def unet_layers(family: str) -> list[str]:
    """The attention layers of a U-Net that is built like the real one, with few channels."""
    blocks = BLOCKS[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8,) * len(blocks),
            down_block_types=blocks,
            up_block_types=tuple(block.replace("Down", "Up") for block in reversed(blocks)),
            transformer_layers_per_block=DEPTHS[family],
            layers_per_block=2,
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    return [key.removeprefix("unet.") for key in layer_shapes({"unet": unet})]


def accepted(family: str) -> dict[str, str]:
    """ComfyUI's rule: every key of a U-Net that it accepts in a kohya file, and the layer it writes.

    SD1.x by the diffusers name; SDXL by the original implementation's, whose blocks are counted here one by one.
    """
    layers = unet_layers(family)
    if family == "sd":
        return {"lora_unet_" + layer.replace(".", "_"): layer for layer in layers}
    places = dict(original_places(len(BLOCKS[family])))
    names = {}
    for layer in layers:
        parts = layer.split(".")
        length = 3 if parts[0] == "mid_block" else 4
        names["lora_unet_" + "_".join([places[".".join(parts[:length])], *parts[length:]])] = layer
    return names


def original_places(num_blocks: int) -> Iterator[tuple[str, str]]:
    """(attention in diffusers, attention in the original) of a U-Net with two layers a block."""
    count = 1  # input_blocks.0 is the first convolution
    for block in range(num_blocks):
        for layer in range(2):
            yield f"down_blocks.{block}.attentions.{layer}", f"input_blocks_{count}_1"
            count += 1
        count += 1  # the downsampler
    yield "mid_block.attentions.0", "middle_block_1"
    count = 0
    for block in range(num_blocks):
        for layer in range(3):  # the upsampler is in the last one
            yield f"up_blocks.{block}.attentions.{layer}", f"output_blocks_{count}_1"
            count += 1


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_every_kohya_name_is_one_that_comfyui_maps_to_this_layer(family: str) -> None:
    layers, rule = unet_layers(family), accepted(family)
    assert len(layers) == {"sd": 128, "sdxl": 560}[family]
    names = {layer: kohya_name(f"unet.{layer}", family == "sdxl") for layer in layers}
    assert len(set(names.values())) == len(layers)
    assert all(rule[name] == layer for layer, name in names.items())


def test_names_of_the_real_models() -> None:
    """Spelled out."""
    down, text = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "encoder.layers.11.self_attn.q_proj"
    assert kohya_name(down, sdxl=True) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert kohya_name(down, sdxl=False) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert kohya_name("unet.mid_block.attentions.0.proj_in", sdxl=True) == "lora_unet_middle_block_1_proj_in"
    kohya = "text_model_encoder_layers_11_self_attn_q_proj"
    assert kohya_name(f"text_encoder.{text}", sdxl=False) == f"lora_te_{kohya}"
    assert kohya_name(f"text_encoder.{text}", sdxl=True) == f"lora_te1_{kohya}"
    assert kohya_name(f"text_encoder_2.{text}", sdxl=True) == f"lora_te2_{kohya}"
    assert diffusers_name(down) == down
    assert diffusers_name(f"text_encoder.{text}") == f"text_encoder.text_model.{text}"
    assert peft_name(f"text_encoder.{text}", SHAPES) == text
    assert peft_name(f"text_encoder_2.{text}", SDXL_SHAPES) == f"text_model.{text}"
    assert peft_name(f"text_encoder.{text}", ("transformer.x", "text_encoder_2.x")) == f"text_model.{text}"  # SD3
    assert peft_name("model.model.layers.0.mlp.up_proj", ()) == "model.layers.0.mlp.up_proj"


def test_every_name_is_found_again() -> None:
    for key in SHAPES:
        names = [diffusers_name(key), kohya_name(key, sdxl=False), key, peft_name(key, (key,))]
        assert all(resolve([name], SHAPES) == {name: key} for name in names)
    for key in SDXL_SHAPES:
        names = [diffusers_name(key), kohya_name(key, sdxl=True), key]
        assert all(resolve([name], SDXL_SHAPES) == {name: key} for name in names)
    llm = {"model.model.layers.0.mlp.up_proj": (4, 4)}
    assert resolve(["model.model.layers.0.mlp.up_proj"], llm) == {"model.model.layers.0.mlp.up_proj": next(iter(llm))}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unet.nowhere"], "has the layer 'unet.nowhere', which the base model does not have"),
        (["encoder.layers.0.self_attn.q_proj"], r"may be text_encoder\..* or text_encoder_2\."),
        (
            ["text_encoder.encoder.layers.0.self_attn.q_proj", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"],
            "holds the layer text_encoder.encoder.layers.0.self_attn.q_proj twice",
        ),
    ],
)
def test_names_of_no_single_layer(names: list[str], message: str) -> None:
    with pytest.raises(SboraError, match=message):
        resolve(names, SDXL_SHAPES)


def test_layers_without_a_name() -> None:
    with pytest.raises(SboraError, match="belongs to a model, this format is for unet, text_encoder, text_encoder_2"):
        kohya_name("model.model.layers.0.mlp.up_proj", sdxl=False)
    with pytest.raises(SboraError, match="belongs to a transformer"):
        kohya_name("transformer.blocks.0", sdxl=False)
    with pytest.raises(SboraError, match="is in no attention block"):
        kohya_name("unet.time_embedding.linear_1", sdxl=True)
