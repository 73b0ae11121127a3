"""The families with a transformer, trained by flow matching: SD3 (and 3.5), and FLUX.1.

Both have a T5 beside their CLIPs. It is far larger and stays frozen: it encodes a learned token by its letters, in
training as in generation, so its encoding of a caption is computed once.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbora_diffusion.models.families.base import (
    ATTENTION,
    Family,
    FlowMatching,
    SampleRequest,
    Sampling,
    TextConditioning,
    TextEncoderSpec,
    call,
    expanded,
    sample_with_negative,
)
from sbora_diffusion.utils.errors import SboraError

JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
CACHED = 256  # captions of which T5's states are kept
TRAINING_GUIDANCE = 1.0  # gives the undistilled prediction of FLUX.1 [dev]


def _encode_text_sd3(pipeline: Any, ids: Tensor) -> TextConditioning:
    """Concatenate both CLIPs' penultimate states, padded to T5's width, and T5's; and both pooled outputs."""
    first, second, *rest = SD3.split(pipeline, ids)
    one = pipeline.text_encoder(first, output_hidden_states=True)
    two = pipeline.text_encoder_2(second, output_hidden_states=True)
    clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    width, length = pipeline.transformer.config.joint_attention_dim, SD3.readers[2].length
    t5 = _cached_states(pipeline.text_encoder_3, rest[0]) if rest else clip.new_zeros(len(ids), length or 0, width)
    states = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
    return TextConditioning(states, torch.cat([one[0], two[0]], dim=-1))


def _predict_sd3(pipeline: Any, noisy: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    states, pooled = text.states, text.pooled
    return pipeline.transformer(noisy, timestep=t, encoder_hidden_states=states, pooled_projections=pooled).sample


def _sample_sd3(pipeline: Any, request: SampleRequest) -> Any:
    """Write out tokens of several vectors, which this pipeline does not do itself."""
    prompts = list(request.prompts)
    by_clip = {
        key: expanded(prompts, getattr(pipeline, reader.tokenizer))
        for key, reader in zip(("prompt", "prompt_2"), SD3.readers, strict=False)
    }
    return sample_with_negative(pipeline, request, **by_clip, prompt_3=prompts)


def _encode_text_flux(pipeline: Any, ids: Tensor) -> TextConditioning:
    clip, t5 = FLUX.split(pipeline, ids)
    return TextConditioning(_cached_states(pipeline.text_encoder_2, t5), pipeline.text_encoder(clip).pooler_output)


def _predict_flux(pipeline: Any, noisy: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
    count, channels, height, width = noisy.shape
    model, like = pipeline.transformer, (noisy.device, noisy.dtype)
    predicted = model(
        hidden_states=pipeline._pack_latents(noisy, count, channels, height, width),
        timestep=t / 1000,
        guidance=torch.full_like(t, TRAINING_GUIDANCE) if model.config.guidance_embeds else None,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.states,
        txt_ids=torch.zeros(text.states.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
        img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, *like),
    ).sample
    return _unpacked(pipeline, predicted, height, width)


def _sample_flux(pipeline: Any, request: SampleRequest) -> Any:
    if request.negative_prompt:
        hint = "leave out --set negative_prompt=…"
        raise SboraError("FLUX has its guidance built in and takes no negative prompt", hint)
    size = pipeline.default_sample_size
    side = size * pipeline.vae_scale_factor
    sampled = call(pipeline, request, height=side, width=side)
    return _unpacked(pipeline, sampled, size, size) if request.as_latents else sampled


def _unpacked(pipeline: Any, packed: Tensor, height: int, width: int) -> Tensor:
    """Convert (n, tokens, 4 · channels) to latents (n, channels, height, width)."""
    scale = pipeline.vae_scale_factor
    return pipeline._unpack_latents(packed, height * scale, width * scale, scale)


_STATES: "WeakKeyDictionary[nn.Module, dict[bytes, Tensor]]" = WeakKeyDictionary()


@torch.no_grad()
def _cached_states(encoder: Any, ids: Tensor) -> Tensor:
    """Return a frozen encoder's states (n, length, width) of ids (n, length), each row encoded once."""
    known, rows = _STATES.setdefault(encoder, {}), []
    for row in ids:
        key = row.cpu().numpy().tobytes()
        if key not in known:
            if len(known) >= CACHED:
                known.pop(next(iter(known)))
            known[key] = encoder(row[None])[0][0]
        rows.append(known[key])
    return torch.stack(rows)


def _flow_flux(pipeline: Any) -> FlowMatching:
    """Shift as generation does: by the number of the image's tokens, or, for [schnell], not at all."""
    config = pipeline.scheduler.config
    if not config.use_dynamic_shifting:
        return FlowMatching(config.shift)
    tokens = (pipeline.default_sample_size // 2) ** 2
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return FlowMatching(math.exp(config.base_shift + slope * (tokens - config.base_image_seq_len)))


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    targets=JOINT_ATTENTION,
    readers=(
        TextEncoderSpec(component="text_encoder", tokenizer="tokenizer"),
        TextEncoderSpec(component="text_encoder_2", tokenizer="tokenizer_2"),
        TextEncoderSpec(component="text_encoder_3", tokenizer="tokenizer_3", learns=False, length=256),
    ),
    encode_text=_encode_text_sd3,
    predict=_predict_sd3,
    noising=lambda pipeline: FlowMatching(pipeline.scheduler.config.shift),
    sample=_sample_sd3,
    latent_size=lambda pipeline: pipeline.transformer.config.sample_size,
    sampling=Sampling(steps=28, guidance=4.5),
    inference_precision="bf16",
)
FLUX = Family(
    name="flux",
    pipeline="FluxPipeline",
    denoiser="transformer",
    targets=JOINT_ATTENTION,
    readers=(
        TextEncoderSpec(component="text_encoder", tokenizer="tokenizer"),
        TextEncoderSpec(component="text_encoder_2", tokenizer="tokenizer_2", learns=False, length=512),
    ),
    encode_text=_encode_text_flux,
    predict=_predict_flux,
    noising=_flow_flux,
    sample=_sample_flux,
    latent_size=lambda pipeline: pipeline.default_sample_size,
    sampling=Sampling(steps=28, guidance=3.5),
    inference_precision="bf16",
)
