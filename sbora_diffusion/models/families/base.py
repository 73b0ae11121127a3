"""What the rest of the code asks of a family: what is adapted, how it reads and answers, how it draws."""

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
    """A forward process."""

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Return (count,) timesteps in the model's own units, one from each of `count` equally likely parts."""
        ...

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at the timesteps t (n,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model is to answer."""
        ...


class Diffusion:
    """The forward process of a pipeline's scheduler."""

    def __init__(self, pipeline: Any) -> None:
        self._scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        self._kind = self._scheduler.config.prediction_type
        if self._kind not in ("epsilon", "v_prediction"):
            raise SboraError(
                f"the base model predicts {self._kind!r}, expected epsilon or v_prediction",
                "its scheduler/scheduler_config.json says so",
            )

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64, stratified over the whole range."""
        number = self._scheduler.config.num_train_timesteps
        return (stratified(count, generator) * number).long().clamp(max=number - 1)

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at the timesteps t (n,)."""
        return self._scheduler.add_noise(latents, noise, t)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, or v (Salimans & Ho 2022)."""
        return noise if self._kind == "epsilon" else self._scheduler.get_velocity(latents, noise, t)

    def min_snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """(n,) weights of the squared errors at the timesteps t (Hang et al. 2023, equation 8, and its form for v).

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
        """(count,) float32 from 0 to 1000: logit-normal with mean 0 and deviation 1 (equation 19), then shifted."""
        level = torch.special.ndtri(stratified(count, generator).double()).sigmoid()
        return (1000 * self._shift * level / (1 + (self._shift - 1) * level)).float()

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at the timesteps t (n,)."""
        level = (t / 1000).view(-1, *[1] * (latents.ndim - 1)).to(latents)
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        """The direction of the line."""
        return noise - latents


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """(count,) from 0 to 1, one from each of `count` equal parts."""
    return (torch.arange(count) + torch.rand(count, generator=generator)) / count


@dataclass(frozen=True, kw_only=True)
class TextEncoderSpec:
    """A text encoder of a pipeline, by the names of its component and of its tokenizer there.

    Attributes:
        learns: whether its attention is adapted and its vocabulary gets the learned tokens.
        length: tokens of a prompt; None for what the tokenizer says.
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
    """How images are drawn."""

    steps: int
    guidance: float
    negative_prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleRequest(Sampling):
    """What is to be drawn: an image for each prompt and generator."""

    prompts: Sequence[str]
    generators: list[torch.Generator]
    as_latents: bool = False  # instead of images


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of base model. The functions take the pipeline, of the class `pipeline`, as their first argument.

    Attributes:
        name: as recipes have it, such as "sdxl".
        pipeline: the name of its class in diffusers.
        denoiser: the component that draws: "unet" or "transformer".
        targets: the denoiser's adapted layers, by the ends of their names.
        readers: its text encoders, in the order of their token ids.
        encode_text: token ids (n, length) to what the text encoders make of them.
        predict: noisy latents (n, c, h, w) and timesteps (n,), under a text, to the answer (n, c, h, w).
        noising: how images become noise, and what the answer is to be.
        sample: images, or latents (n, c, h, w).
        latent_size: height and width of the latents of an image as the model was trained.
        sampling: how images are drawn where nobody says.
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
    inference_precision: str = "fp32"  # on a GPU

    def present(self, pipeline: Any) -> list[TextEncoderSpec]:
        """The text encoders that a pipeline has: SD3 can do without T5."""
        return [reader for reader in self.readers if getattr(pipeline, reader.component) is not None]

    def modules(self, pipeline: Any) -> list[nn.Module]:
        """Everything with weights."""
        names = [self.denoiser, "vae", *(reader.component for reader in self.present(pipeline))]
        return [getattr(pipeline, name) for name in names]

    def frozen(self, pipeline: Any) -> list[nn.Module]:
        """The large part: what learns nothing but an adapter, the denoiser and the text encoders without tokens."""
        names = [reader.component for reader in self.present(pipeline) if not reader.learns]
        return [getattr(pipeline, name) for name in (self.denoiser, *names)]

    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> Tensor:
        """(len(captions), length) int64: the ids of all text encoders side by side.

        Tokens of several vectors are expanded, too long captions cut.
        """
        return torch.cat([_ids(pipeline, reader, captions) for reader in self.present(pipeline)], dim=1)

    def split(self, pipeline: Any, ids: Tensor) -> list[Tensor]:
        """Each text encoder's part of such ids."""
        return list(ids.split([_length(pipeline, reader) for reader in self.present(pipeline)], dim=1))


def _length(pipeline: Any, reader: TextEncoderSpec) -> int:
    return reader.length or getattr(pipeline, reader.tokenizer).model_max_length


def _ids(pipeline: Any, reader: TextEncoderSpec, captions: Sequence[str]) -> Tensor:
    tokenizer = getattr(pipeline, reader.tokenizer)
    prompts = expanded(captions, tokenizer) if reader.learns else list(captions)
    length = _length(pipeline, reader)
    encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids.to(pipeline.device)


def expanded(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Prompts with a token of several vectors written out: `<dog> <dog>_1`."""
    converted: Any = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    return converted


def call(pipeline: Any, drawing: SampleRequest, **options: Any) -> Any:
    """A pipeline's images or latents, with what all pipelines understand."""
    result: Any = pipeline(
        **{"prompt": list(drawing.prompts)} | options,
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance,
        generator=drawing.generators,
        output_type="latent" if drawing.as_latents else "pil",
    )
    return result.images


def sample_with_negative(pipeline: Any, drawing: SampleRequest, **options: Any) -> Any:
    """Guided away from the negative prompt; without one, from what the model was trained to answer to no prompt."""
    negative = [drawing.negative_prompt] * len(drawing.prompts) if drawing.negative_prompt else None
    return call(pipeline, drawing, negative_prompt=negative, **options)
