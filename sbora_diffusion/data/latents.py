"""Encode images once for a training; record the base model's own predictions and the inputs of its layers."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from sbora_diffusion.data.concept import ConceptImage
from sbora_diffusion.data.images import bucket_of, load_image, load_mask, names_a_side, to_mask, to_tensor
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Noising
from sbora_diffusion.models.loading import EMBEDDED, embedded_folder
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import write_file

log = logging.getLogger(__name__)

MAX_BATCH_ELEMENTS = 65_536  # latent elements in one pass of the base model: 32 images of 8 × 16 × 16


@dataclass(frozen=True, eq=False)
class Batch:
    """n noisy latents, their timesteps (n,) and token ids (n, length), and the model's target."""

    noisy: Tensor
    t: Tensor
    ids: Tensor
    target: Tensor

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(*(torch.cat([getattr(self, key), getattr(other, key)]) for key in vars(self)))


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Encoded images of one shape."""

    latents: Tensor  # (n, channels, height, width)
    captions: list[str]
    masks: Tensor | None = None  # (n, 1, height, width) from 0 to 1; None: whole images


@torch.no_grad()
def encode(base: Base, images: Sequence[ConceptImage], config: TrainConfig) -> list[EncodedImages]:
    """Encode `crops` random crops of every image with captions and masks, grouped by shape."""
    generator = torch.Generator().manual_seed(config.seed)
    uses_masks = config.loss.masked_loss or config.loss.attention_weight
    masks = {image: load_mask(image.path) if uses_masks else None for image in images}
    if uses_masks and images and not any(masks.values()):
        log.warning("no image has a mask: whole images are learned (see docs/training.md)")
    groups: dict[tuple[int, int], list[EncodedImages]] = {}
    for image in images:
        opened, mask, resolution = load_image(image.path), masks[image], base.resolution
        size = bucket_of(*opened.size, resolution) if config.data.buckets else (resolution, resolution)
        boxes = [_crop(opened.size, generator, config.data.smallest_crop) for _ in range(config.data.crops)]
        flips = _flips(image.caption, generator, config)
        pixels = torch.stack([to_tensor(_cut(opened, box, flip), size) for box, flip in zip(boxes, flips, strict=True)])
        latents = base.to_latents(pixels.to(base.device))
        height, width = latents.shape[-2:]
        cut_masks = latents.new_ones(len(latents), 1, height, width) if any(masks.values()) else None
        if mask is not None:
            cut = [to_mask(_cut(mask, *where), size, (height, width)) for where in zip(boxes, flips, strict=True)]
            cut_masks = torch.stack(cut).to(latents)
            _check_masks(image.path, cut_masks)
        groups.setdefault(size, []).append(EncodedImages(latents, [image.caption] * config.data.crops, cut_masks))
    return [_concatenate(group) for _, group in sorted(groups.items())]


def _check_masks(path: Path, masks: Tensor) -> None:
    """Raise SboraError if no crop of an image shows anything of its mask; warn if some do not."""
    empty = int((masks.flatten(1).amax(1) == 0).sum())
    if empty == len(masks):
        raise SboraError(
            f"no crop of {path} shows anything of its mask",
            "crop the image around its subject, or keep its proportions with --set buckets=true",
        )
    if empty:
        log.warning("%d of %d crops of %s show nothing of its mask", empty, len(masks), path)


def _concatenate(group: Sequence[EncodedImages]) -> EncodedImages:
    masks = [each.masks for each in group if each.masks is not None]
    return EncodedImages(
        torch.cat([each.latents for each in group]),
        [caption for each in group for caption in each.captions],
        torch.cat(masks) if masks else None,
    )


def _flips(caption: str, generator: torch.Generator, config: TrainConfig) -> list[bool]:
    """Choose which crops of an image are mirrored."""
    if not config.data.flip or names_a_side(caption):
        return [False] * config.data.crops
    return (torch.rand(config.data.crops, generator=generator) < config.data.flip).tolist()


def _cut(image: Image.Image, box: tuple[int, int, int, int], flip: bool) -> Image.Image:
    part = image.crop(box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part


def _crop(size: tuple[int, int], generator: torch.Generator, smallest: float) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random crop of at least `smallest` of the image's sides."""
    part, left, top = torch.rand(3, generator=generator).tolist()
    part = smallest + (1 - smallest) * part
    width, height = round(size[0] * part), round(size[1] * part)
    x, y = round((size[0] - width) * left), round((size[1] - height) * top)
    return x, y, x + width, y + height


@torch.no_grad()
def base_predictions(
    base: Base, latents: Tensor, ids: Tensor, noising: Noising, count: int, generator: torch.Generator
) -> Batch:
    """Return the base model's predictions for `count` noisy versions of latents, each under its caption."""
    rows = torch.randint(len(latents), (count,), generator=generator)
    t = noising.timesteps(count, generator).to(base.device)
    noise = torch.randn((count, *latents.shape[1:]), generator=generator).to(base.device)
    noisy, ids = noising.add(latents[rows], noise, t), ids[rows]
    size = _max_batch(noisy[0].numel())
    parts = zip(noisy.split(size), t.split(size), ids.split(size), strict=True)
    predicted = [base.predict(noisy_part, t_part, base.encode_text(own)) for noisy_part, t_part, own in parts]
    return Batch(noisy, t, ids, torch.cat(predicted))


def split_for_memory(batch: B) -> list[B]:
    """Split a batch into parts that the base model can take in one pass."""
    size, fields = _max_batch(batch.noisy[0].numel()), vars(batch)
    return [
        replace(batch, **{key: None if rows is None else rows[at : at + size] for key, rows in fields.items()})
        for at in range(0, len(batch.t), size)
    ]


def _max_batch(numel: int) -> int:
    """Return how many images go into one pass, by the elements of one image's latents."""
    return max(8, MAX_BATCH_ELEMENTS // numel)


@torch.no_grad()
def sample_latents(base: Base, prompts: Sequence[str], seeds: Sequence[int], config: TrainConfig) -> Tensor:
    """Generate images of the prompts with the base model, as latents (len(prompts), channels, height, width)."""
    denoiser: Any = base.denoiser
    size = _max_batch(denoiser.config.in_channels * base.family.latent_size(base.pipeline) ** 2)
    how = {"steps": config.output.sampling_steps, "guidance": config.output.guidance, "as_latents": True}
    parts = range(0, len(prompts), size)
    return torch.cat([base.sample(prompts[at : at + size], seeds=seeds[at : at + size], **how) for at in parts])


FILE = "prior.safetensors"  # in the embedded model's folder
_KEY, _SOURCE = "latents", "drawn from"


def prior_latents(base: Base, config: TrainConfig) -> Tensor:
    """Return an image of each prior prompt from the seeds 0, 1, …, as latents (n, channels, height, width).

    They are the same for every training on this base model, whatever its seed.
    """
    if base.id == EMBEDDED:
        with safe_open(embedded_folder() / FILE, "pt") as file:
            if file.metadata().get(_SOURCE) == _describe(base, config):
                return file.get_tensor(_KEY).to(base.device).float()
    return sample_prior(base, config)


def sample_prior(base: Base, config: TrainConfig) -> Tensor:
    """Generate these images."""
    return sample_latents(base, config.loss.prior_prompts, range(len(config.loss.prior_prompts)), config)


def save_prior(base: Base, config: TrainConfig, path: Path) -> None:
    """Generate these images and save them in fp16."""
    latents = {_KEY: sample_prior(base, config).half().cpu().contiguous()}
    write_file(path, safetensors.torch.save(latents, {_SOURCE: _describe(base, config)}), overwrite=True)


def _describe(base: Base, config: TrainConfig) -> str:
    """Return everything that the images depend on."""
    source = {"fingerprint": base.fingerprint, "prompts": config.loss.prior_prompts}
    return json.dumps(source | {"steps": config.output.sampling_steps, "guidance": config.output.guidance})


class Moments:
    """Running E[x xᵀ] of the inputs x of layers, in float64; `columns` selects x's columns by layer, None all."""

    def __init__(self, columns: Mapping[str, Tensor | None]) -> None:
        self._columns, self._sums, self._counts = columns, dict[str, Tensor](), dict[str, int]()

    def add(self, key: str, inputs: Tensor) -> None:
        """Add inputs (..., in) of the layer `key`."""
        rows, columns = inputs.detach().flatten(0, -2), self._columns[key]
        rows = (rows if columns is None else rows[:, columns.to(rows.device)]).double()
        self._sums[key] = self._sums.get(key, 0) + rows.T @ rows
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def means(self) -> dict[str, Tensor]:
        """Return (n, n) float64 on the CPU, by "<component>.<canonical layer>"."""
        return {key: (total / self._counts[key]).cpu() for key, total in self._sums.items()}


@contextmanager
def recorded_inputs(base: Base, columns: Mapping[str, Tensor | None]) -> Iterator[Moments]:
    """Record the inputs of these layers of the base model inside the context; `columns` as for `Moments`."""
    moments = Moments(columns)

    def record(key: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(key, inputs[0])

    with ExitStack() as hooks:
        for key in columns:
            hooks.callback(base.layers[key].register_forward_pre_hook(partial(record, key)).remove)
        yield moments
