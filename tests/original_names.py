"""Tiny Stable Diffusion and SDXL pipelines as one file with the original names, as people share models."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
)
SDXL_UNET = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2"),
)
OPEN_CLIP = (
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.", ""),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm(\d)", r".ln_\1"),
    (r"\.mlp\.fc1", ".mlp.c_fc"),
    (r"\.mlp\.fc2", ".mlp.c_proj"),
)
VAE = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", r"down.\1.downsample.conv"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"up.{1 - int(m[1])}.upsample.conv"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def save_original(pipeline: Path, file: Path) -> Path:
    """The weights of a folder that `save_tiny_pipeline` wrote, as one file."""
    tensors = _unet_and_vae(pipeline, UNET)
    for key, tensor in load_file(pipeline / "text_encoder/model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    save_file(tensors, file)
    return file


def save_original_sdxl(pipeline: Path, file: Path) -> Path:
    """The weights of a folder that `save_tiny_sdxl` wrote, as one file, and its settings beside it."""
    tensors = _unet_and_vae(pipeline, SDXL_UNET)
    for key, tensor in load_file(pipeline / "text_encoder/model.safetensors").items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    second = load_file(pipeline / "text_encoder_2/model.safetensors")
    tensors["conditioner.embedders.1.model.text_projection"] = second.pop("text_projection.weight").T.contiguous()
    for key in list(second):
        for kind in ("weight", "bias"):
            if key.endswith(f".q_proj.{kind}"):
                fused = torch.cat([second.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
                second[key.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = fused
    tensors |= {f"conditioner.embedders.1.model.{_renamed(key, OPEN_CLIP)}": each for key, each in second.items()}
    save_file(tensors, file)
    shutil.copytree(pipeline, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return file


def _unet_and_vae(pipeline: Path, rules: tuple) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(pipeline / "unet/diffusion_pytorch_model.safetensors").items():
        name = _renamed(key, rules)
        if ".resnets." in key:
            part = next(part for part in RESNET if f".{part}." in key)
            name = name.replace(part, RESNET[part])
        tensors[f"model.diffusion_model.{name}"] = tensor
    for key, tensor in load_file(pipeline / "vae/diffusion_pytorch_model.safetensors").items():
        is_convolution = re.search(r"attentions.*to_.*weight", key)  # a convolution of 1 × 1 there
        tensors[f"first_stage_model.{_renamed(key, VAE)}"] = tensor[:, :, None, None] if is_convolution else tensor
    return tensors


def _renamed(key: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
