"""Evaluate concepts: make their images for a suite of prompts, alone and merged, and let a judge score them."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.encoders import Encoder, ImageEncoder
from sbora_diffusion.evaluation.gallery import claimed, read_image
from sbora_diffusion.evaluation.results import Report, Result
from sbora_diffusion.evaluation.scores import Judge, instruct, reference_images, score
from sbora_diffusion.evaluation.series import Series, draw, plan
from sbora_diffusion.evaluation.suite import Suite
from sbora_diffusion.inference.generate import check_base, generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.training.checkpoint import image_digest, versions
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

BATCH = 8  # images made at once


def evaluate(
    base: Base,
    adapters: Sequence[Adapter],
    suite: Suite,
    concepts: Sequence[Concept],
    encoder: Encoder,
    seeds: Sequence[int],
    folder: Path,
    *,
    merged: Adapter | None = None,
    vision: ImageEncoder | None = None,
    sampling: Sampling | None = None,
    batch_size: int = BATCH,
    force: bool = False,
    on_image: Callable[[int, int], None] | None = None,
) -> Report:
    """Make the images that `folder` does not have yet, and score all of them.

    An image is written whole or not at all, so an evaluation that was stopped or killed goes on where it was. The
    seed is the sample's number, the same for all prompts and models, so single and merged differ by the weights alone.

    Args:
        adapters: one for each concept to evaluate.
        suite: prompts for one concept at a time, or for all of `adapters` in one image.
        concepts: whom an image may be taken for; those of the adapters, by name, among them.
        merged: a merge of the adapters, to be compared with each of them alone.
        sampling: None for what is usual for the base model.
        batch_size: images made at once.
        force: throw away the images of another evaluation in the folder.
        on_image: told how many images there are, and how many there will be.

    Raises:
        SboraError: nothing to evaluate, an adapter without its concept or for another base, a folder that belongs to
            another evaluation, a damaged image, a suite for another number of concepts.
    """
    sampling = sampling or base.sampling
    _check_numbers(base, adapters, seeds, sampling, batch_size)
    for adapter in [*adapters, *([merged] if merged else [])]:
        check_base(adapter, base)
    all_series = plan(suite, adapters, merged)
    _check_concepts(adapters, concepts)
    about = _describe(base, adapters, merged, suite, concepts, encoder, vision, sampling, seeds)
    total = len(all_series) * len(suite.prompts) * len(seeds)
    with claimed(folder, _identity(about), force) as images:
        before = 0
        for series in all_series:
            for done in draw(base, series, images, seeds, sampling, batch_size):
                if on_image:
                    on_image(before + done, total)
            before += len(suite.prompts) * len(seeds)
        references = reference_images(concepts)
        judge = instruct(encoder, references, vision)
        results = [result for series in all_series for result in _judge(series, judge, images, seeds)]
    names = [adapter.spec.name for adapter in adapters]
    title = f"{', '.join(names)} on {suite.name}, judged by {encoder.id}"
    shown = {name: references[name] for name in names}
    return Report(title=title, about=about, results=tuple(results), references=shown)


@torch.no_grad()
def quick_score(
    base: Base,
    concept: Concept,
    encoder: Encoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
) -> dict[str, float]:
    """Score a concept as it is in the base model at this moment, in the middle of its training say.

    Nothing is written, neither into the model nor to disk, and no random number is taken from anybody's generator.

    Args:
        prompts: with the concept's token in them; each is drawn with every seed.
        sampling: None for what is usual for the base model.

    Returns:
        The mean of each metric of `scores.METRICS` but success, for which there is nobody to be mistaken for.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = []
    for start in range(0, len(jobs), BATCH):
        texts, each = zip(*jobs[start : start + BATCH], strict=True)
        images += generate(base, texts, seeds=each, **vars(sampling or base.sampling))
    judge = instruct(encoder, reference_images([concept]), None)
    tokens = {concept.token: concept.class_noun}
    scores = score(images, [prompt for prompt, _ in jobs], judge, tokens, [concept.name])[concept.name]
    return {metric: values.mean().item() for metric, values in scores.items()}


def _check_numbers(
    base: Base, adapters: Sequence[Adapter], seeds: Sequence[int], sampling: Sampling, batch_size: int
) -> None:
    """What could not be drawn is refused before a folder is claimed for it."""
    if not adapters or not seeds:
        raise SboraError(f"got {len(adapters)} adapters and {len(seeds)} seeds, expected at least one of both")
    if batch_size < 1:
        raise SboraError(f"got batch_size={batch_size}, expected at least 1")
    base.choose_sampling(seeds, sampling.steps, sampling.guidance)


def _check_concepts(adapters: Iterable[Adapter], concepts: Iterable[Concept]) -> None:
    known = {concept.name: concept for concept in concepts}
    for adapter in adapters:
        name = adapter.spec.name
        if name not in known:
            raise SboraError(f"the images of {name} are not known", "give their folder: --concept DIR")
        if adapter.spec.recipe.get("images") not in (None, image_digest(known[name])):
            log.warning("%s was trained with other images than those that it is compared with", name)


def _judge(series: Series, judge: Judge, images: Path, seeds: Sequence[int]) -> list[Result]:
    files = series.files(images, seeds)
    prompts = [prompt for prompt in series.prompts for _ in seeds]
    stream = (read_image(path) for row in files for path in row)
    return [
        Result(
            model=series.model,
            concept=concept,
            shown=series.shown,
            prompts=series.prompts,
            images=files,
            scores={metric: values.view(len(series.prompts), len(seeds)) for metric, values in scores.items()},
        )
        for concept, scores in score(stream, prompts, judge, series.tokens, series.shown).items()
    ]


def _describe(
    base: Base,
    adapters: Sequence[Adapter],
    merged: Adapter | None,
    suite: Suite,
    concepts: Iterable[Concept],
    encoder: Encoder,
    vision: ImageEncoder | None,
    sampling: Sampling,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Everything needed to repeat the evaluation, in JSON values."""
    return {
        "adapters": {adapter.spec.name: _sha256(adapter) for adapter in adapters},
        "merged": {merged.spec.name: _sha256(merged)} if merged else None,
        "suite": {"name": suite.name, "sha256": suite.sha256, "prompts": [prompt.text for prompt in suite.prompts]},
        "base": {"id": base.id, "fingerprint": base.fingerprint},
        "encoder": {"id": encoder.id, "weights": encoder.weights},
        "vision": {"id": vision.id, "weights": vision.weights} if vision else None,
        "sampling": dict(vars(sampling)),
        "seeds": list(seeds),
        "dtype": str(base.denoiser.dtype).removeprefix("torch."),
        "device": base.device.type,
        "references": {c.name: {"images": len(c.images), "digest": image_digest(c)} for c in concepts},
        "versions": versions(),
    }


def _identity(about: dict[str, Any]) -> dict[str, str]:
    """What tells this evaluation's images from another's. More seeds only add images."""
    adapters = {f"adapter {name}": digest[:16] for name, digest in about["adapters"].items()}
    merged = about["merged"] or {"none": ""}
    return adapters | {
        "merged": " ".join(f"{name} {digest[:16]}" for name, digest in merged.items()),
        "suite": f"{about['suite']['name']} {about['suite']['sha256'][:16]}",
        "base": about["base"]["fingerprint"],
        "encoder": about["encoder"]["id"],
        **{key: str(value) for key, value in about["sampling"].items()},
    }


def _sha256(adapter: Adapter) -> str:
    """That of the adapter's file."""
    return hashlib.sha256(adapter.to_bytes()).hexdigest()
