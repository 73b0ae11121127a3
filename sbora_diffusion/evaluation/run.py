"""Run an evaluation: generate the images of concepts for a suite of prompts, and score them."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.gallery import ImageFiles, claimed, read_image
from sbora_diffusion.evaluation.judges.base import Judge, Scorer, prepare
from sbora_diffusion.evaluation.references import reference_images
from sbora_diffusion.evaluation.reports.results import Report, Result
from sbora_diffusion.evaluation.series import Series, generate_missing, plan
from sbora_diffusion.evaluation.suites.suite import Suite
from sbora_diffusion.inference.generate import check_base, generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.training.checkpoint import image_digest, versions
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import with_older_names

log = logging.getLogger(__name__)

BATCH = 8  # images generated at once


def run_evaluation(
    base: Base,
    adapters: Sequence[Adapter],
    suite: Suite,
    concepts: Sequence[Concept],
    judges: Sequence[Judge],
    seeds: Sequence[int],
    folder: Path,
    *,
    merged: Adapter | None = None,
    sampling: Sampling | None = None,
    batch_size: int = BATCH,
    force: bool = False,
    on_image: Callable[[int, int], None] | None = None,
) -> Report:
    """Generate the images that `folder` does not have yet, and score all of them.

    An evaluation that was stopped or killed can be resumed. All prompts and models get the same seeds, so single and
    merged differ by the weights only.

    Args:
        adapters: one for each concept to evaluate.
        suite: prompts for one concept at a time, or for all of `adapters` in one image.
        concepts: those of the adapters, by name, and others that an image may be mistaken for.
        judges: one of each kind; the first names the report.
        merged: a merge of the adapters, to be compared with each of them.
        sampling: None for the base model's usual sampling.
        batch_size: images generated at once.
        force: delete the images of another evaluation in the folder.
        on_image: called with the number of images so far, and of all.

    Raises:
        SboraError: nothing to evaluate, an adapter without its concept or for another base, a folder that belongs to
            another evaluation, a damaged image, a suite for another number of concepts.
    """
    sampling = sampling or base.sampling
    _check_request(base, adapters, seeds, sampling, batch_size)
    for adapter in [*adapters, *([merged] if merged else [])]:
        check_base(adapter, base)
    all_series = plan(suite, adapters, merged)
    _check_concepts(adapters, concepts)
    about = _describe(base, adapters, merged, suite, concepts, judges, sampling, seeds)
    identity, older = _identity(about, judges[0]), _identity(_with_older_digests(about, adapters, merged), judges[0])
    with claimed(folder, identity, force, older) as images:
        _generate_all(base, all_series, images, seeds, sampling, batch_size, on_image)
        references = reference_images(concepts)
        scorer = prepare(judges, references)
        results = [result for series in all_series for result in _score(series, scorer, images, seeds)]
    names = [adapter.spec.name for adapter in adapters]
    return Report(
        title=f"{', '.join(names)} on {suite.name}, judged by {judges[0].id}",
        about=about,
        metrics={key: metric for judge in judges for key, metric in judge.metrics.items()},
        results=tuple(results),
        references={name: references[name] for name in names},
    )


@torch.no_grad()
def quick_score(
    base: Base,
    concept: Concept,
    judge: Judge,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
) -> dict[str, float]:
    """Score a concept that is applied to the base model at the moment, for example while it is trained.

    Nothing is written, neither into the model nor to disk, and no global random number generator is used.

    Args:
        prompts: with the concept's token in them; an image of each is generated with every seed.
        sampling: None for the base model's usual sampling.

    Returns:
        The mean of each of the judge's metrics, without those that need other concepts, such as success.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = []
    for start in range(0, len(jobs), BATCH):
        texts, each = zip(*jobs[start : start + BATCH], strict=True)
        images += generate(base, texts, seeds=each, **vars(sampling or base.sampling))
    scorer = prepare([judge], reference_images([concept]))
    tokens = {concept.token: concept.class_noun}
    scores = scorer(images, [prompt for prompt, _ in jobs], tokens, [concept.name])[concept.name]
    return {metric: values.mean().item() for metric, values in scores.items()}


def _check_request(
    base: Base, adapters: Sequence[Adapter], seeds: Sequence[int], sampling: Sampling, batch_size: int
) -> None:
    """Raise SboraError for what could not be generated, before a folder is claimed."""
    if not adapters or not seeds:
        raise SboraError(f"got {len(adapters)} adapters and {len(seeds)} seeds, expected at least one of each")
    if batch_size < 1:
        raise SboraError(f"got batch_size={batch_size}, expected at least 1")
    base.choose_sampling(seeds, sampling.steps, sampling.guidance)


def _check_concepts(adapters: Iterable[Adapter], concepts: Iterable[Concept]) -> None:
    known = {concept.name: concept for concept in concepts}
    for adapter in adapters:
        name = adapter.spec.name
        if name not in known:
            raise SboraError(f"no reference images of {name} were found", "give their folder: --concept DIR")
        if adapter.spec.recipe.get("images") not in (None, image_digest(known[name])):
            log.warning("%s was trained with other images than its reference images here", name)


def _generate_all(
    base: Base,
    all_series: Sequence[Series],
    images: Path,
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    on_image: Callable[[int, int], None] | None,
) -> None:
    counts = [len(series.prompts) * len(seeds) for series in all_series]
    for number, series in enumerate(all_series):
        for done in generate_missing(base, series, images, seeds, sampling, batch_size):
            if on_image:
                on_image(sum(counts[:number]) + done, sum(counts))


def _score(series: Series, scorer: Scorer, images: Path, seeds: Sequence[int]) -> list[Result]:
    files = series.files(images, seeds)
    prompts = [prompt for prompt in series.prompts for _ in seeds]
    found = scorer(
        ImageFiles([path for row in files for path in row], read_image), prompts, series.tokens, series.shown
    )
    return [
        Result(
            model=series.model,
            concept=concept,
            shown=series.shown,
            prompts=series.prompts,
            images=files,
            scores={metric: values.view(len(series.prompts), len(seeds)) for metric, values in scores.items()},
        )
        for concept, scores in found.items()
    ]


def _describe(
    base: Base,
    adapters: Sequence[Adapter],
    merged: Adapter | None,
    suite: Suite,
    concepts: Iterable[Concept],
    judges: Sequence[Judge],
    sampling: Sampling,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Return everything needed to repeat the evaluation, in JSON values."""
    return _digests(adapters, merged) | {
        "suite": {"name": suite.name, "sha256": suite.sha256, "prompts": [prompt.text for prompt in suite.prompts]},
        "base": {"id": base.id, "fingerprint": base.fingerprint},
        **{judge.kind: {"id": judge.id, "weights": judge.weights} for judge in judges},
        "sampling": dict(vars(sampling)),
        "seeds": list(seeds),
        "dtype": str(base.denoiser.dtype).removeprefix("torch."),
        "device": base.device.type,
        "references": {c.name: {"images": len(c.images), "digest": image_digest(c)} for c in concepts},
        "versions": versions(),
    }


def _identity(about: dict[str, Any], judge: Judge) -> dict[str, str]:
    """Return what distinguishes this evaluation from others in its folder; more seeds only add images."""
    adapters = {f"adapter {name}": digest[:16] for name, digest in about["adapters"].items()}
    merged = about["merged"] or {"none": ""}
    return adapters | {
        "merged": " ".join(f"{name} {digest[:16]}" for name, digest in merged.items()),
        "suite": f"{about['suite']['name']} {about['suite']['sha256'][:16]}",
        "base": about["base"]["fingerprint"],
        judge.kind: judge.id,
        **{key: str(value) for key, value in about["sampling"].items()},
    }


def _with_older_digests(about: dict[str, Any], adapters: Sequence[Adapter], merged: Adapter | None) -> dict[str, Any]:
    """Return `about` as of adapter files whose recipes have the older names of settings."""
    *own, merge = [
        each and replace(each, spec=replace(each.spec, recipe=with_older_names(each.spec.recipe)))
        for each in (*adapters, merged)
    ]
    return about | _digests([adapter for adapter in own if adapter], merge)


def _digests(adapters: Sequence[Adapter], merged: Adapter | None) -> dict[str, Any]:
    return {
        "adapters": {adapter.spec.name: _sha256(adapter) for adapter in adapters},
        "merged": {merged.spec.name: _sha256(merged)} if merged else None,
    }


def _sha256(adapter: Adapter) -> str:
    """Return the digest of the adapter's file."""
    return hashlib.sha256(adapter.to_bytes()).hexdigest()
