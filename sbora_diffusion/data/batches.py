"""What a training learns from: computed once, then drawn from at every step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sbora_diffusion.data.captions import shuffle_tags
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.data.latents import Batch, EncodedImages, answers, encode, in_parts, sample_latents
from sbora_diffusion.data.prior import prior_latents
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.distributed import Processes
from sbora_diffusion.models.families.noise import Diffusion, Noising
from sbora_diffusion.models.moments import recorded_inputs
from sbora_diffusion.models.target_modules import adapted_layers
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import say_plainly

PRIOR_SIZE = 192  # answers of the base model that are held
VALIDATION_SIZE = 32  # noisy versions of the images that are held out

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, eq=False)
class Data:
    """The encoded images with their captions, and the base model's answers that are to hold."""

    shots: list[EncodedImages]  # to learn from, by shape
    held_out: list[EncodedImages]  # to validate with
    of_class: EncodedImages | None  # the base model's own images of the class noun
    prior: list[Batch]  # by shape
    noising: Noising
    moments: dict[str, Tensor]  # of the adapted layers' inputs on the prior prompts, where the adapter is to be quiet


def prepare_data(concept: Concept, base: Base, config: TrainConfig) -> Data:
    """Encode the images and ask the untouched base model for the answers that training holds in place.

    Half of them ("prior prediction") are to the concept's images under the captions of its class, so that the class
    stays what it was; half to the base model's own images of the prior prompts, so that the adapter is quiet on
    everything else, other concepts' images included.
    """
    count = len(concept.images) - config.data.validation_images
    if count < 1:
        raise SboraError(
            f"got validation_images={config.data.validation_images} of {len(concept.images)} images: none is left",
            "hold out fewer",
        )
    shots, held_out = encode(base, concept.images[:count], config), encode(base, concept.images[count:], config)
    noising, generator = base.family.noising(base.pipeline), torch.Generator().manual_seed(config.seed)
    most = max(shots, key=lambda each: len(each.latents))
    said = [say_plainly(caption, concept.token, concept.class_noun) for caption in most.captions]
    prior = answers(base, most.latents, base.tokenize(said), noising, PRIOR_SIZE // 2, generator)
    of_class = _class_shots(concept, base, config)
    if not config.loss.prior_prompts:
        return Data(shots, held_out, of_class, [prior], noising, {})
    drawn, ids = prior_latents(base, config), base.tokenize(config.loss.prior_prompts)
    quiet = adapted_layers(base, config) if config.loss.output_penalty else {}
    with recorded_inputs(base, {f"{part}.{name}": None for part, names in quiet.items() for name in names}) as moments:
        others = answers(base, drawn, ids, noising, PRIOR_SIZE // 2, generator)
    kept = [prior + others] if prior.noisy.shape[1:] == others.noisy.shape[1:] else [prior, others]
    return Data(shots, held_out, of_class, kept, noising, moments.means())


def _class_shots(concept: Concept, base: Base, config: TrainConfig) -> EncodedImages | None:
    """DreamBooth's prior preservation (Ruiz et al. 2023, section 3.3): what the base model draws of the class noun."""
    if not config.data.class_images:
        return None
    plain = [say_plainly(prompt, concept.token, concept.class_noun) for prompt in config.output.preview_prompts]
    prompts = [plain[number % len(plain)] for number in range(config.data.class_images)]
    seeds = range(config.seed, config.seed + len(prompts))
    return EncodedImages(sample_latents(base, prompts, seeds, config), prompts)


@dataclass(frozen=True, eq=False)
class Sample(Batch):
    """A batch with what its squared errors count."""

    weights: Tensor | None = None  # (n,)
    masks: Tensor | None = None  # (n, 1, height, width)


class BatchSampler:
    """Draws batches; what is drawn depends on the generator only, and each of several processes gets its share."""

    def __init__(self, data: Data, base: Base, config: TrainConfig, processes: Processes) -> None:
        self._data, self._base, self._config, self._processes = data, base, config, processes
        self._ids = [base.tokenize(shots.captions) for shots in data.shots]
        self._empty = base.tokenize([""])
        if config.loss.min_snr_gamma and not isinstance(data.noising, Diffusion):
            raise SboraError(f"min_snr_gamma is for diffusion, {base.id} is trained by flow matching", "set it to 0")

    def of_concept(self, generator: torch.Generator) -> Sample:
        """Noisy crops of the images, all of one shape."""
        number = _chosen([len(shots.latents) for shots in self._data.shots], generator)
        shots, count = self._data.shots[number], self._config.data.batch_size * self._processes.count
        rows = torch.randint(len(shots.latents), (count,), generator=generator)
        sample = self._noised(shots, rows, self._ids[number][rows], generator)
        dropped = torch.rand(count, 1, generator=generator) < self._config.data.caption_dropout
        ids = sample.ids
        if self._config.data.shuffle_tags:
            ids = self._base.tokenize([shuffle_tags(shots.captions[row], generator) for row in rows.tolist()])
        ids = torch.where(dropped.to(ids.device), self._empty, ids)
        return self._share(replace(sample, ids=ids))

    def of_class(self, generator: torch.Generator) -> Sample | None:
        """As many noisy versions of the base model's own images of the class."""
        shots = self._data.of_class
        if shots is None:
            return None
        count = self._config.data.batch_size * self._processes.count
        rows = torch.randint(len(shots.latents), (count,), generator=generator)
        ids = self._base.tokenize([shots.captions[row] for row in rows.tolist()])
        return self._share(self._noised(shots, rows, ids, generator))

    def of_prior(self, generator: torch.Generator) -> Batch:
        """The base model's own answers, of one shape."""
        prior = self._data.prior[_chosen([len(batch.t) for batch in self._data.prior], generator)]
        count = self._config.loss.prior_batch * self._processes.count
        rows = torch.randint(len(prior.t), (count,), generator=generator)
        return self._share(Batch(prior.noisy[rows], prior.t[rows], prior.ids[rows], prior.target[rows]))

    def held_out(self) -> list[Sample]:
        """Always the same noisy versions of the images that are not learned from, in parts to be asked about."""
        generator = torch.Generator().manual_seed(self._config.seed)
        found = []
        for shots in self._data.held_out:
            rows = torch.randint(len(shots.latents), (VALIDATION_SIZE,), generator=generator)
            ids = self._base.tokenize([shots.captions[row] for row in rows.tolist()])
            found += in_parts(self._noised(shots, rows, ids, generator))
        return found

    @torch.no_grad()
    def _share(self, batch: B) -> B:
        if self._base.encodes_collectively and len(batch.ids):
            self._base.encode_text(batch.ids)  # an encoder in shares remembers what it reads, and asks nobody again
        parts = {key: None if part is None else self._processes.share(part) for key, part in vars(batch).items()}
        return replace(batch, **parts)

    def _noised(self, shots: EncodedImages, rows: Tensor, ids: Tensor, generator: torch.Generator) -> Sample:
        noising, device, latents = self._data.noising, self._base.device, shots.latents[rows]
        t = noising.timesteps(len(rows), generator).to(device)
        noise = torch.randn(latents.shape, generator=generator)
        if self._config.loss.noise_offset:
            noise = noise + self._config.loss.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
        noise, gamma = noise.to(device), self._config.loss.min_snr_gamma
        weights = noising.min_snr_weights(t, gamma) if gamma and isinstance(noising, Diffusion) else None
        masks = None if shots.masks is None else shots.masks[rows]
        return Sample(noising.add(latents, noise, t), t, ids, noising.target(latents, noise, t), weights, masks)


def _chosen(counts: Sequence[int], generator: torch.Generator) -> int:
    """The number of a shape, each as likely as there are such."""
    return int(torch.multinomial(torch.tensor(counts).float(), 1, generator=generator)) if len(counts) > 1 else 0
