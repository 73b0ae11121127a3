"""Base models: the one place that knows where they lie, what is adapted in them and how wide it is."""

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import nn

from sbora_diffusion.adapter.basis import Side, canonical
from sbora_diffusion.errors import SboraError
from sbora_diffusion.hub import cache_if_offline, why

log = logging.getLogger(__name__)

TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
_FINGERPRINT_ENTRIES = 1024  # entries of each adapted weight that enter the fingerprint


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded Stable Diffusion pipeline, frozen, and what adapters need to know about it."""

    id: str
    pipeline: StableDiffusionPipeline

    def component(self, name: str) -> nn.Module:
        """The U-Net or the text encoder."""
        return getattr(self.pipeline, name)

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    @property
    def resolution(self) -> int:
        """Pixels of a picture's side, as the model was trained."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The layers that adapters may write, by "<component>.<canonical layer>"."""
        return {
            f"{component}.{canonical(name)}": module
            for component, targets in TARGETS.items()
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

        Entries are rounded to fp16 first, so that the fp32 and fp16 files of one model agree.
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


def load_base(name: str) -> Base:
    """Load a base model in fp32, on the GPU if there is one.

    Args:
        name: "emoji64" (ships with the package), a diffusers folder, or a model id of the hub.
    """
    folder = files("sbora_diffusion") / "emoji64" / "weights" if name == "emoji64" else Path(name)
    path = str(folder) if folder.is_dir() else name
    if name == "emoji64" and not folder.is_dir():
        raise SboraError("the emoji64 weights are not in this installation", "reinstall the package")
    try:
        with cache_if_offline():
            pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32, safety_checker=None)
    except (OSError, ValueError, KeyError) as error:
        raise SboraError(
            f"could not load base model {name!r}: {why(error)}",
            "give emoji64, a folder in diffusers' format, or a hub id that can be reached",
        ) from error
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise SboraError(f"base model {name!r} is a {type(pipeline).__name__}, expected a StableDiffusionPipeline")
    return Base(name, _prepare(pipeline))


def _prepare(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False).eval()
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
