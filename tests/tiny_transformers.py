"""SD3 and FLUX pipelines with random weights and the real ones' parts, for what must be loaded by the real code."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from .tiny_sdxl import TEXT_WIDTHS, clip_tokenizer, text_config

T5_WIDTH = sum(TEXT_WIDTHS)
PIXELS = 16


def save_tiny_sd3(folder: Path, seed: int = 0) -> Path:
    """Two joint blocks, the first with SD3.5's second attention; two CLIPs and a T5; 16×16 pixels."""
    torch.manual_seed(seed)
    clip, clip_2 = clip_tokenizer(), clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=PIXELS // 2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT_WIDTHS[1],
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(len(clip), TEXT_WIDTHS[0])),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(text_config(len(clip), TEXT_WIDTHS[1])),
        tokenizer_2=clip_2,
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def save_tiny_flux(folder: Path, seed: int = 0) -> Path:
    """One joint and one single block, guidance embedded as in FLUX.1 [dev], CLIP and T5."""
    torch.manual_seed(seed)
    clip = clip_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=TEXT_WIDTHS[0],
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(len(clip), TEXT_WIDTHS[0])),
        tokenizer=clip,
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        norm_num_groups=4,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
    )


def _t5_tokenizer() -> T5Tokenizer:
    letters = "▁<>abcdefghijklmnopqrstuvwxyz0123456789"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in letters)], extra_ids=0)
