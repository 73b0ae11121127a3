"""The families with a U-Net: Stable Diffusion 1.x and 2.x (emoji64 too), and SDXL."""

from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.models.families.base import (
    ATTENTION,
    Diffusion,
    Family,
    Sampling,
    TextConditioning,
    TextEncoderSpec,
    sample_with_negative,
)


def _encode_text(pipeline: Any, ids: Tensor) -> TextConditioning:
    return TextConditioning(pipeline.text_encoder(ids).last_hidden_state)


def _predict(pipeline: Any, noisy: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    return pipeline.unet(noisy, t, text.states).sample


def _encode_text_xl(pipeline: Any, ids: Tensor) -> TextConditioning:
    """Concatenate both encoders' penultimate states; zeros for no prompt, where the pipeline is configured so."""
    first, second = SDXL.split(pipeline, ids)
    one = pipeline.text_encoder(first, output_hidden_states=True)
    two = pipeline.text_encoder_2(second, output_hidden_states=True)
    states, pooled = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two[0]
    if pipeline.config.force_zeros_for_empty_prompt:
        is_given = (ids != SDXL.tokenize(pipeline, [""])).any(1)
        states, pooled = states * is_given[:, None, None], pooled * is_given[:, None]
    return TextConditioning(states, pooled)


def _predict_xl(pipeline: Any, noisy: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    """Predict with the size conditioning of generation (Podell et al. 2023, section 2.2): an uncropped image."""
    height, width = (side * pipeline.vae_scale_factor for side in noisy.shape[-2:])
    sizes = [(height, width, 0, 0, height, width)] * len(noisy)  # original size, top left of the crop, target size
    ids = torch.tensor(sizes, dtype=noisy.dtype, device=noisy.device)
    added = {"text_embeds": text.pooled, "time_ids": ids}
    return pipeline.unet(noisy, t, text.states, added_cond_kwargs=added).sample


def _latent_size(pipeline: Any) -> int:
    return pipeline.unet.config.sample_size


SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    targets=ATTENTION,
    readers=(TextEncoderSpec(component="text_encoder", tokenizer="tokenizer"),),
    encode_text=_encode_text,
    predict=_predict,
    noising=Diffusion,
    sample=sample_with_negative,
    latent_size=_latent_size,
    sampling=Sampling(steps=50, guidance=7.5),  # as Mix-of-Show and others evaluate on it
)
SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    targets=ATTENTION,
    readers=(
        TextEncoderSpec(component="text_encoder", tokenizer="tokenizer"),
        TextEncoderSpec(component="text_encoder_2", tokenizer="tokenizer_2"),
    ),
    encode_text=_encode_text_xl,
    predict=_predict_xl,
    noising=Diffusion,
    sample=sample_with_negative,
    latent_size=_latent_size,
    sampling=Sampling(steps=30, guidance=6.0),
    inference_precision="bf16",
)
