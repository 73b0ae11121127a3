"""Base models: a loaded pipeline, its family, and what adapters need to know about it."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side, canonical
from sbora_diffusion.adapters.layer import keep_linear4bit_unpacked
from sbora_diffusion.models.families import family_of
from sbora_diffusion.models.families.base import (
    CLIP_ATTENTION,
    Family,
    SampleRequest,
    Sampling,
    TextConditioning,
    TextEncoderSpec,
)
from sbora_diffusion.models.loading import (
    EMBEDDED,
    EMBEDDED_SAMPLING,
    TYPES,
    full_name,
    inference_precision,
    is_emoji64,
    load_pipeline,
    to_device,
    to_half,
)
from sbora_diffusion.utils.errors import SboraError

MAX_STEPS, SEEDS = 1000, 2**63  # of generation
_FINGERPRINT_ENTRIES = 1024  # entries of each adapted weight that enter the fingerprint


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded diffusers pipeline of a known family, frozen, and what adapters need to know about it.

    Attributes:
        precision: of all weights but the autoencoder's and of arithmetic: fp32, bf16, fp16, or nf4, which is bf16 with
            most frozen weights in four bits.
    """

    id: str
    pipeline: Any
    precision: str = "fp32"

    @cached_property
    def family(self) -> Family:
        return family_of(self.pipeline)

    @cached_property
    def kind(self) -> str:
        """Whose recipes, prompts and sampling suit it: "emoji64" or its family's name."""
        return EMBEDDED if is_emoji64(self.id) else self.family.name

    @property
    def sampling(self) -> Sampling:
        """Defaults of generation."""
        return EMBEDDED_SAMPLING if self.kind == EMBEDDED else self.family.sampling

    def component(self, name: str) -> nn.Module:
        """Return the U-Net or transformer, or a text encoder."""
        return getattr(self.pipeline, name)

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net or transformer."""
        return self.component(self.family.denoiser)

    @property
    def adapted(self) -> dict[str, tuple[str, ...]]:
        """Component -> ends of the names of its adapted layers."""
        return {self.family.denoiser: self.family.targets} | {one.component: CLIP_ATTENTION for one in self.learners}

    @property
    def learners(self) -> list[TextEncoderSpec]:
        """The text encoders that are adapted and learn tokens."""
        return [reader for reader in self.family.present(self.pipeline) if reader.learns]

    @property
    def encodes_collectively(self) -> bool:
        """Whether a text encoder is sharded, so that all processes have to encode the same captions."""
        from torch.distributed.fsdp import FSDPModule

        encoders = (self.component(reader.component) for reader in self.family.present(self.pipeline))
        return any(isinstance(encoder, FSDPModule) for encoder in encoders)

    def tokenizer(self, reader: TextEncoderSpec) -> Any:
        """Return a text encoder's tokenizer."""
        return getattr(self.pipeline, reader.tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device  # the pipeline's own goes through all modules to find out

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Return autocast to the model's half precision; nothing for fp32."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, TYPES[self.precision])

    @property
    def resolution(self) -> int:
        """Side of an image that the model was trained on, in pixels."""
        return self.family.latent_size(self.pipeline) * self.pipeline.vae_scale_factor

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The layers that adapters may write, by "<component>.<canonical layer>"."""
        return {
            f"{component}.{canonical(name)}": module
            for component, targets in self.adapted.items()
            for name, module in self.component(component).named_modules()
            if isinstance(module, nn.Linear) and name.endswith(tuple(f".{target}" for target in targets))
        }

    @cached_property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every layer in `layers`."""
        return {key: (layer.out_features, layer.in_features) for key, layer in self.layers.items()}

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the adapted layers' names, shapes and sampled entries.

        Entries are rounded to fp16 first, so that the fp32 and fp16 files of one model agree; a model loaded in half
        precision has the fingerprint of its files.
        """
        digest = hashlib.sha256()
        for key, layer in sorted(self.layers.items()):
            entries = layer.weight.detach().flatten()
            sample = entries[:: max(1, len(entries) // _FINGERPRINT_ENTRIES)].to("cpu", torch.float16)
            digest.update(f"{key} {tuple(layer.weight.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    def adapted_layers(self, blocks: Sequence[str] = (), *, text_encoders: bool = True) -> dict[str, list[str]]:
        """Return component -> canonical names of the layers to train.

        Args:
            blocks: prefixes of the denoiser's layers to adapt; empty for all.
            text_encoders: whether the text encoders' layers are adapted, too.

        Raises:
            SboraError: a block without such layers.
        """
        found: dict[str, list[str]] = {}
        for key in self.layers:
            component, _, layer = key.partition(".")
            found.setdefault(component, []).append(layer)
        denoiser = found.pop(self.family.denoiser)
        for block in blocks:
            if not any(layer.startswith(f"{block}.") for layer in denoiser):
                known = ", ".join(sorted({layer.partition(".")[0] for layer in denoiser}))
                hint = f"choose from {known}, or a block in them"
                raise SboraError(f"got blocks={block}, which has no attention", hint)
        chosen = [layer for layer in denoiser if not blocks or layer.startswith(tuple(f"{block}." for block in blocks))]
        return {self.family.denoiser: chosen} | (found if text_encoders else {})

    def width(self, side: Side) -> int:
        """Return how many columns (fa) or rows (fb) the narrowest adapted layer has: the ledger's length."""
        return min(self.widths(side).values())

    def widths(self, side: Side) -> dict[str, int]:
        """Return how many columns (fa) or rows (fb) each adapted layer has."""
        return {key: shape[1 if side == "fa" else 0] for key, shape in self.layer_shapes.items()}

    def choose_sampling(self, seeds: Sequence[int], steps: int | None, guidance: float | None) -> tuple[int, float]:
        """Return steps and guidance, the base model's own where they are None.

        Raises:
            SboraError: steps, guidance or a seed out of range.
        """
        steps = self.sampling.steps if steps is None else steps
        guidance = self.sampling.guidance if guidance is None else guidance
        if not 1 <= steps <= MAX_STEPS:
            raise SboraError(f"got steps={steps}, expected 1 to {MAX_STEPS}")
        if not math.isfinite(guidance):
            raise SboraError(f"got guidance={guidance}, expected a number")
        if wrong := [seed for seed in seeds if not 0 <= seed < SEEDS]:
            raise SboraError(f"got the seed {wrong[0]}, expected 0 to {SEEDS - 1}")
        return steps, guidance

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        as_latents: bool = False,
    ) -> Any:
        """Generate images, or latents (n, channels, height, width), one for each prompt and seed.

        An image depends on its own prompt and seed only, not on the rest of the call.

        Raises:
            SboraError: as `choose_sampling`.
        """
        steps, guidance = self.choose_sampling(seeds, steps, guidance)
        request = SampleRequest(
            prompts=[normalize("NFC", prompt) for prompt in prompts],
            generators=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            as_latents=as_latents,
        )
        with self.arithmetic(), self.finite_pixels():
            sampled = self.family.sample(self.pipeline, request)
        return sampled.float() if as_latents else sampled

    @contextmanager
    def finite_pixels(self) -> Iterator[None]:
        """Raise SboraError for an image of infinite or undefined values, which would be saved as black."""

        def check(_module: nn.Module, _inputs: Any, pixels: Tensor) -> None:
            if not pixels.isfinite().all():
                raise SboraError("the image has infinite or undefined values", "lower strengths or learning rate")

        hook = self.pipeline.vae.decoder.register_forward_hook(check)
        try:
            yield
        finally:
            hook.remove()

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return (len(captions), length) int64: the ids of all text encoders side by side, too long captions cut."""
        return self.family.tokenize(self.pipeline, [normalize("NFC", caption) for caption in captions])

    def encode_text(self, ids: Tensor) -> TextConditioning:
        """Encode token ids with all text encoders."""
        with self.arithmetic():
            return self.family.encode_text(self.pipeline, ids)

    def predict(self, noisy: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """Predict noise, v or velocity, by the family, for noisy latents at timesteps t (n,) under encoded text."""
        with self.arithmetic():
            return self.family.predict(self.pipeline, noisy, t, text)

    def to_latents(self, pixels: Tensor) -> Tensor:
        """Encode (n, 3, height, width) from -1 to 1 as the denoiser's latents."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (vae.encode(pixels).latent_dist.mode() - shift) * vae.config.scaling_factor


def load_unplaced(name: str) -> Base:
    """Load a base model only for its layers and fingerprint: on the CPU, in its files' precision."""
    name = full_name(name)
    return Base(name, load_pipeline(name, torch.bfloat16))


def load_base(name: str, precision: str = "fp32", sharded: bool = False) -> Base:
    """Load a base model, on the GPU if there is one.

    Args:
        name: "emoji64" (ships with the package), a short name such as "sdxl", a diffusers folder, a .safetensors
            checkpoint (see `loading.settings_of` for its settings), or a model id of the hub.
        precision: fp32; bf16 or fp16 for half the memory, nf4 for an eighth; "" for the default of generation.
        sharded: keep only this process's shard of the frozen weights.

    Raises:
        SboraError: an unknown precision, sharded nf4, besides what `load_pipeline` raises.
    """
    name, precision = full_name(name), precision or inference_precision(name, torch.cuda.is_available())
    if precision not in TYPES:
        raise SboraError(f"got precision={precision}, expected one of {', '.join(TYPES)}")
    if sharded and precision == "nf4":
        raise SboraError("weights in nf4 cannot be sharded", "--set precision=bf16, or the full model in every process")
    base = Base(name, load_pipeline(name, TYPES[precision]), precision)
    _ = base.fingerprint  # cached, of the weights as they are in the files
    if precision != "fp32":
        to_half(base.pipeline, base.family, TYPES[precision])
    if precision == "nf4":
        from sbora_diffusion.models.quantization import to_nf4

        for model in base.family.frozen(base.pipeline):
            to_nf4(model)
        del vars(base)["layers"]  # they have been replaced
    to_device(base.pipeline, base.family, sharded)
    for model in base.family.modules(base.pipeline):  # a pipeline can also be stored in four bits
        keep_linear4bit_unpacked(model)
    return base
