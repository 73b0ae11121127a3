"""What a family of base models defines: the adapted layers, text encoding, prediction, noising and sampling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from sbora_diffusion.utils.errors import SboraError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class Noising(Protocol):
    """A forward process; timesteps are in the model's own units."""

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (count,) timesteps, one from each of `count` equally likely parts."""
        ...

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return noisy latents at the timesteps t (n,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the model should predict."""
        ...


class Diffusion:
    """The forward process of a pipeline's scheduler; the target is the noise, or v (Salimans & Ho 2022)."""

    def __init__(self, pipeline: Any) -> None:
        self._scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._kind = self._scheduler.config.prediction_type
        if self._kind not in ("epsilon", "v_prediction"):
            raise SboraError(
                f"the base model predicts {self._kind!r}, expected epsilon or v_prediction",
                "see its scheduler/scheduler_config.json",
            )

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:  # int64
        number = self._scheduler.config.num_train_timesteps
        return (stratified(count, generator) * number).long().clamp(max=number - 1)

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise if self._kind == "epsilon" else self._scheduler.get_velocity(latents, noise, t)

    def min_snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """Return (n,) weights of the squared errors at the timesteps t (Hang et al. 2023, equation 8, and its v form).

        With SNR = signal² / noise²: min(SNR, γ) / SNR where noise is predicted, min(SNR, γ) / (SNR + 1) for v.
        """
        kept = self._scheduler.alphas_cumprod.to(t.device)[t].double()
        snr = kept / (1 - kept)
        if self._kind == "epsilon":
            return torch.where(snr <= gamma, torch.ones_like(snr), gamma / snr).float()
        return (snr.clamp(max=gamma) / (snr + 1)).float()


class FlowMatching:
    """A straight line from the image (t = 0) to noise (t = 1000): rectified flow (Esser et al. 2024, section 2).

    Args:
        shift: how far the noise levels are moved towards noise, as the scheduler does in generation (section 5.3.2).
    """

    def __init__(self, shift: float) -> None:
        self._shift = shift

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (count,) float32 from 0 to 1000: logit-normal, mean 0, deviation 1 (equation 19), then shifted."""
        level = torch.special.ndtri(stratified(count, generator).double()).sigmoid()
        return (1000 * self._shift * level / (1 + (self._shift - 1) * level)).float()

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        level = (t / 1000).view(-1, *[1] * (latents.ndim - 1)).to(latents)
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return noise - latents


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """Return (count,) from 0 to 1, one from each of `count` equal parts."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec:
    """A text encoder of a pipeline, by the names of its component and of its tokenizer there.

    Attributes:
        learns: whether its attention is adapted and its vocabulary gets the learned tokens.
        length: tokens of a prompt; None for the tokenizer's own.
    """

    component: str
    tokenizer: str
    learns: bool = True
    length: int | None = None


@dataclass(frozen=True, eq=False)
class TextConditioning:
    """Encoded text: states (n, tokens, hidden), and for some families a pooled summary (n, width)."""

    states: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are generated."""

    steps: int
    guidance: float
    negative_prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleRequest(Sampling):
    """What to generate: an image, or latents, for each prompt and generator."""

    prompts: Sequence[str]
    generators: list[torch.Generator]
    as_latents: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of base model. The functions take the pipeline, of the class `pipeline`, as their first argument.

    Attributes:
        name: as recipes have it, such as "sdxl".
        pipeline: the name of its class in diffusers.
        denoiser: the component that denoises: "unet" or "transformer".
        targets: the denoiser's adapted layers, by the ends of their names.
        readers: its text encoders, in the order of their token ids.
        encode_text: token ids (n, length) to their encoding.
        predict: noisy latents (n, c, h, w) and timesteps (n,), under encoded text, to the prediction (n, c, h, w).
        latent_size: height and width of the latents of an image at the model's resolution.
        sampling: defaults of generation.
        inference_precision: default precision of generation on a GPU.
    """

    name: str
    pipeline: str
    denoiser: str
    targets: tuple[str, ...]
    readers: tuple[TextEncoderSpec, ...]
    encode_text: Callable[[Any, Tensor], TextConditioning]
    predict: Callable[[Any, Tensor, Tensor, TextConditioning], Tensor]
    noising: Callable[[Any], Noising]
    sample: Callable[[Any, SampleRequest], Any]
    latent_size: Callable[[Any], int]
    sampling: Sampling
    inference_precision: str = "fp32"

    def present(self, pipeline: Any) -> list[TextEncoderSpec]:
        """List the text encoders that a pipeline has: SD3 can do without T5."""
        return [reader for reader in self.readers if getattr(pipeline, reader.component) is not None]

    def modules(self, pipeline: Any) -> list[nn.Module]:
        """List everything with weights."""
        names = [self.denoiser, "vae", *(reader.component for reader in self.present(pipeline))]
        return [getattr(pipeline, name) for name in names]

    def frozen(self, pipeline: Any) -> list[nn.Module]:
        """List what learns nothing but an adapter: the denoiser and the text encoders without learned tokens."""
        names = [reader.component for reader in self.present(pipeline) if not reader.learns]
        return [getattr(pipeline, name) for name in (self.denoiser, *names)]

    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> Tensor:
        """Return (len(captions), length) int64: the ids of all text encoders side by side.

        Tokens of several vectors are expanded, too long captions cut.
        """
        parts = []
        for reader in self.present(pipeline):
            tokenizer = getattr(pipeline, reader.tokenizer)
            prompts = expanded(captions, tokenizer) if reader.learns else list(captions)
            length = _length(pipeline, reader)
            encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            parts.append(encoded.input_ids.to(pipeline.device))
        return torch.cat(parts, dim=1)

    def split(self, pipeline: Any, ids: Tensor) -> list[Tensor]:
        """Split such ids into each text encoder's."""
        return list(ids.split([_length(pipeline, reader) for reader in self.present(pipeline)], dim=1))


def _length(pipeline: Any, reader: TextEncoderSpec) -> int:
    return reader.length or getattr(pipeline, reader.tokenizer).model_max_length


def expanded(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Write out tokens of several vectors in prompts: `<dog> <dog>_1`."""
    converted: Any = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    return converted


def call(pipeline: Any, request: SampleRequest, **options: Any) -> Any:
    """Return a pipeline's images or latents, given the arguments that all pipelines have."""
    result: Any = pipeline(
        **{"prompt": list(request.prompts)} | options,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=request.generators,
        output_type="latent" if request.as_latents else "pil",
    )
    return result.images


def sample_with_negative(pipeline: Any, request: SampleRequest, **options: Any) -> Any:
    """Sample with guidance away from the negative prompt, or else from the model's own empty prompt."""
    negative = [request.negative_prompt] * len(request.prompts) if request.negative_prompt else None
    return call(pipeline, request, negative_prompt=negative, **options)


def repeated_blocks(model: Any) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model of diffusers or transformers by name, outer ones before inner ones."""
    kinds = set(model._no_split_modules or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
