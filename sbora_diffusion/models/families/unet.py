"""The families with a U-Net: Stable Diffusion 1.x and 2.x (emoji64 too), and SDXL."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.models.families.base import (
    ATTENTION,
    Family,
    Reader,
    Sampling,
    Text,
    draw_with_negative,
)
from sbora_diffusion.models.families.noise import Diffusion


def _read(pipeline: Any, ids: Tensor) -> Text:
    return Text(pipeline.text_encoder(ids).last_hidden_state)


def _answer(pipeline: Any, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
    return pipeline.unet(noisy, t, text.states).sample


def _read_xl(pipeline: Any, ids: Tensor) -> Text:
    """Both encoders' last but one states side by side, and the second's pooled answer.

    No prompt at all is all zeros, if the pipeline says that the model was trained so.
    """
    first, second = SDXL.split(pipeline, ids)
    one = pipeline.text_encoder(first, output_hidden_states=True)
    two = pipeline.text_encoder_2(second, output_hidden_states=True)
    states, pooled = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two[0]
    if pipeline.config.force_zeros_for_empty_prompt:
        is_said = (ids != SDXL.tokenize(pipeline, [""])).any(1)
        states, pooled = states * is_said[:, None, None], pooled * is_said[:, None]
    return Text(states, pooled)


def _answer_xl(pipeline: Any, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
    """The size conditioning (Podell et al. 2023, section 2.2) is that of generation: a whole picture of its size."""
    added = {"text_embeds": text.pooled, "time_ids": _size(noisy, pipeline.vae_scale_factor)}
    return pipeline.unet(noisy, t, text.states, added_cond_kwargs=added).sample


def _size(noisy: Tensor, scale: int) -> Tensor:
    """(n, 6): original height and width, top and left of the crop, target height and width, in pixels."""
    height, width = noisy.shape[-2] * scale, noisy.shape[-1] * scale
    size: Sequence[int] = (height, width, 0, 0, height, width)
    return torch.tensor([size] * len(noisy), dtype=noisy.dtype, device=noisy.device)


def _latent_size(pipeline: Any) -> int:
    return pipeline.unet.config.sample_size


SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    targets=ATTENTION,
    readers=(Reader(component="text_encoder", tokenizer="tokenizer"),),
    read=_read,
    answer=_answer,
    noising=Diffusion,
    draw=draw_with_negative,
    latent_size=_latent_size,
    sampling=Sampling(steps=50, guidance=7.5),  # as Mix-of-Show and others evaluate on it
)
SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    targets=ATTENTION,
    readers=(
        Reader(component="text_encoder", tokenizer="tokenizer"),
        Reader(component="text_encoder_2", tokenizer="tokenizer_2"),
    ),
    read=_read_xl,
    answer=_answer_xl,
    noising=Diffusion,
    draw=draw_with_negative,
    latent_size=_latent_size,
    sampling=Sampling(steps=30, guidance=6.0),
)
