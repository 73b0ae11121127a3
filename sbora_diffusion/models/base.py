"""Base models: a loaded pipeline, its family, and what adapters need to know about it."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor, nn

from sbora_diffusion.adapters.basis import Side, canonical
from sbora_diffusion.adapters.layer import keep_linear4bit_unpacked
from sbora_diffusion.models.distributed import is_sharded
from sbora_diffusion.models.families.base import (
    CLIP_ATTENTION,
    Family,
    SampleRequest,
    Sampling,
    TextConditioning,
    TextEncoderSpec,
)
from sbora_diffusion.models.families.registry import family_of
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
from sbora_diffusion.models.quantization import to_nf4
from sbora_diffusion.utils.errors import SboraError

MAX_STEPS, SEEDS = 1000, 2**63  # of a drawing
_FINGERPRINT_ENTRIES = 1024  # entries of each adapted weight that enter the fingerprint


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded diffusers pipeline of a known family, frozen, and what adapters need to know about it.

    Attributes:
        precision: what all weights but the autoencoder's are held and computed in: fp32, bf16 or fp16; nf4 is bf16 with
            most of what is frozen in four bits.
    """

    id: str
    pipeline: Any
    precision: str = "fp32"

    @cached_property
    def family(self) -> Family:
        return family_of(self.pipeline)

    @cached_property
    def kind(self) -> str:
        """Whose recipes, prompts and sampling suit it: "emoji64" or its family's name, as `recipe_base` has it."""
        return EMBEDDED if is_emoji64(self.id) else self.family.name

    @property
    def sampling(self) -> Sampling:
        """How its images are drawn where nobody says."""
        return EMBEDDED_SAMPLING if self.kind == EMBEDDED else self.family.sampling

    def component(self, name: str) -> nn.Module:
        """The U-Net or transformer, or a text encoder."""
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
        """Whether a text encoder is kept in shares, so that all processes have to read the same captions."""
        return any(is_sharded(self.component(reader.component)) for reader in self.family.present(self.pipeline))

    def tokenizer(self, reader: TextEncoderSpec) -> Any:
        """A text encoder's tokenizer."""
        return getattr(self.pipeline, reader.tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device  # the pipeline's own goes through all modules to find out

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Where the model computes: autocast, if its weights are of half precision."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, TYPES[self.precision])

    @property
    def resolution(self) -> int:
        """Pixels of an image's side, as the model was trained."""
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

        Entries are rounded to fp16 first, so that the fp32 and fp16 files of one model agree; a model that is loaded in
        half precision has the fingerprint of its files.
        """
        digest = hashlib.sha256()
        for key, layer in sorted(self.layers.items()):
            entries = layer.weight.detach().flatten()
            sample = entries[:: max(1, len(entries) // _FINGERPRINT_ENTRIES)].to("cpu", torch.float16)
            digest.update(f"{key} {tuple(layer.weight.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    def width(self, side: Side) -> int:
        """How many columns (fa) or rows (fb) the narrowest adapted layer has: the ledger's length."""
        return min(self.widths(side).values())

    def widths(self, side: Side) -> dict[str, int]:
        """How many columns (fa) or rows (fb) each adapted layer has."""
        return {key: shape[1 if side == "fa" else 0] for key, shape in self.layer_shapes.items()}

    def choose_sampling(self, seeds: Sequence[int], steps: int | None, guidance: float | None) -> tuple[int, float]:
        """Steps and guidance as they are given, or as is usual for this base model.

        Raises:
            SboraError: steps or a seed that cannot be, guidance that is no number.
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
        """Images, or latents (n, channels, height, width), one for each prompt and seed.

        An image depends on its own prompt and seed only, not on what else is in the call.

        Args:
            steps, guidance: None for what is usual for this base model.

        Raises:
            SboraError: steps or a seed that cannot be, guidance that is no number.
        """
        steps, guidance = self.choose_sampling(seeds, steps, guidance)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        drawing = SampleRequest(
            prompts=[normalize("NFC", prompt) for prompt in prompts],
            generators=generators,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            as_latents=as_latents,
        )
        with self.arithmetic():
            drawn = self.family.sample(self.pipeline, drawing)
        return drawn.float() if as_latents else drawn

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """(len(captions), length) int64: the ids of all text encoders side by side, too long captions cut."""
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
        """(n, 3, height, width) from -1 to 1, as the denoiser knows images."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (vae.encode(pixels).latent_dist.mode() - shift) * vae.config.scaling_factor


def load_unplaced(name: str) -> Base:
    """A base model for its layers and its fingerprint alone: on the CPU, in what its files are in."""
    name = full_name(name)
    return Base(name, load_pipeline(name, torch.bfloat16))


def load_base(name: str, precision: str = "fp32", sharded: bool = False) -> Base:
    """Load a base model, on the GPU if there is one.

    Args:
        name: "emoji64" (ships with the package), a short name such as "sdxl", a diffusers folder, a .safetensors
            checkpoint (see single_file.py for its settings), or a model id of the hub.
        precision: bf16 or fp16 take half the memory of fp32, what nf4 packs an eighth; the autoencoder stays in fp32.
            "" is what suits drawing (`loading.inference_precision`).
        sharded: keep this process's share of the frozen weights only (sharding.py).

    Raises:
        SboraError: an unknown precision, nf4 in shares, besides what `load_pipeline` raises.
    """
    name, precision = full_name(name), precision or inference_precision(name, torch.cuda.is_available())
    if precision not in TYPES:
        raise SboraError(f"got precision={precision}, expected one of {', '.join(TYPES)}")
    if sharded and precision == "nf4":
        raise SboraError("weights in nf4 cannot be kept in shares", "--set precision=bf16, or whole in every process")
    base = Base(name, load_pipeline(name, TYPES[precision]), precision)
    _ = base.fingerprint  # kept from now on: of the weights as they are in the files
    if precision != "fp32":
        to_half(base.pipeline, base.family, TYPES[precision])
    if precision == "nf4":
        for model in base.family.frozen(base.pipeline):
            to_nf4(model)
        del vars(base)["layers"]  # they are others now
    to_device(base.pipeline, base.family, sharded)
    for model in base.family.modules(base.pipeline):  # a pipeline can also be stored in four bits
        keep_linear4bit_unpacked(model)
    return base
