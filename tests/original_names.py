"""A tiny Stable Diffusion pipeline as one file with the original implementation's names, as people share models."""

import re
from pathlib import Path

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
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(pipeline / "unet/diffusion_pytorch_model.safetensors").items():
        name = _renamed(key, UNET)
        if ".resnets." in key:
            part = next(part for part in RESNET if f".{part}." in key)
            name = name.replace(part, RESNET[part])
        tensors[f"model.diffusion_model.{name}"] = tensor
    for key, tensor in load_file(pipeline / "vae/diffusion_pytorch_model.safetensors").items():
        is_convolution = re.search(r"attentions.*to_.*weight", key)  # a convolution of 1 × 1 there
        tensors[f"first_stage_model.{_renamed(key, VAE)}"] = tensor[:, :, None, None] if is_convolution else tensor
    for key, tensor in load_file(pipeline / "text_encoder/model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    save_file(tensors, file)
    return file


def _renamed(key: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
