"""The published numbers of trainable parameters, counted on models of full size without weights.

A language model or text encoder is one of its equal blocks here, whose parameters are multiplied by their number.
"""

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.layer import attach

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"


def llama(**config: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **config))


def unet(**config: Any) -> nn.Module:
    return UNet2DConditionModel(layers_per_block=2, **config)


MODELS = {
    "LLaMA-7B": lambda: llama(hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
    "LLaMA-13B": lambda: llama(hidden_size=5120, intermediate_size=13824, num_attention_heads=40),
    "LLaMA3-8B": lambda: llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "SD1.5": lambda: unet(
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    "SD2.1": lambda: unet(
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    "SDXL": lambda: unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, UP),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "CLIP-L": lambda: CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=12)
    ),
}
BLOCKS = {"LLaMA-7B": 32, "LLaMA-13B": 40, "LLaMA3-8B": 32, "CLIP-L": 12}
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SEVEN = (*FIVE, "o_proj", "gate_proj")
UNET = ("to_q", "to_k", "to_v", "to_out.0")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")

# model, adapted layers, rank, number of adapted layers, LoRA, DoRA, SBoRA-FA, SBoRA-FB
TABLE = [
    ("LLaMA-7B", FIVE, 32, 160, 56_098_816, 56_975_360, 28_049_408, 28_049_408),
    ("LLaMA-7B", FIVE, 64, 160, 112_197_632, 113_074_176, 56_098_816, 56_098_816),
    ("LLaMA3-8B", FIVE, 32, 160, 56_623_104, 57_409_536, 25_165_824, 31_457_280),
    ("LLaMA3-8B", FIVE, 64, 160, 113_246_208, 114_032_640, 50_331_648, 62_914_560),
    ("LLaMA-7B", SEVEN, 64, 224, 159_907_840, 161_267_712, 87_031_808, 72_876_032),
    ("LLaMA-13B", SEVEN, 64, 280, 250_347_520, 252_477_440, 136_314_880, 114_032_640),
    ("LLaMA3-8B", SEVEN, 64, 224, 167_772_160, 169_148_416, 88_080_384, 79_691_776),
    ("SD1.5", UNET, 4, 128, 797_184, None, 399_360, 397_824),
    ("SD2.1", UNET, 4, 128, 829_952, None, 399_360, 430_592),
    ("SDXL", UNET, 4, 560, 5_806_080, None, 2_662_400, 3_143_680),
    ("CLIP-L", CLIP, 4, 48, 294_912, None, 147_456, 147_456),
]


@pytest.mark.parametrize(
    ("name", "targets", "rank", "layers", "lora", "dora", "fa", "fb"),
    [pytest.param(*row, id=f"{row[0]}-{len(row[1])}-r{row[2]}") for row in TABLE],
)
def test_trainable_parameters(
    name: str, targets: tuple[str, ...], rank: int, layers: int, lora: int, dora: int | None, fa: int, fb: int
) -> None:
    blocks = BLOCKS.get(name, 1)
    model = inject(name, targets, rank)
    assert num_trainable(model) * blocks == lora
    sides: tuple[tuple[Side, int], ...] = (("fa", fa), ("fb", fb))
    for side, count in sides:
        assert len(attach(model, "default", side, Interval(0, rank), seed=0)) * blocks == layers
        assert num_trainable(model) * blocks == count
    if dora is not None:
        assert num_trainable(inject(name, targets, rank, use_dora=True)) * blocks == dora


def inject(name: str, targets: tuple[str, ...], rank: int, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model = MODELS[name]().requires_grad_(False)
        return inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(targets), **options), model, "default")


def num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
