"""Evaluate concepts: generate their images for a suite of prompts, score them, and write a report."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.images import (
    ImageFiles,
    Series,
    all_concepts,
    claimed,
    generate_missing,
    own_token,
    plan,
    read_image,
    reference_images,
)
from sbora_diffusion.evaluation.judges import load_judge
from sbora_diffusion.evaluation.judges.base import Judge, Scorer, prepare
from sbora_diffusion.evaluation.report import Report, Result, write_report
from sbora_diffusion.evaluation.suites import Suite, load_suite
from sbora_diffusion.inference.generate import check_base
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.models.loading import is_emoji64
from sbora_diffusion.training.checkpoint import image_digest, versions
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import with_older_names

log = logging.getLogger(__name__)

SEEDS = range(4)  # images of each prompt
BATCH = 8  # images generated at once
EVALUATIONS = Path("evaluations")

OnImage = Callable[[int, int], None] | None


def evaluate(
    adapters: Sequence[Adapter | str | Path],
    merged: Adapter | str | Path | None = None,
    *,
    base: Base | str = "",
    suite: Suite | str = "",
    judge: Judge | str = "",
    other_judges: Sequence[Judge | str] = (),
    concepts: Iterable[Concept | str] = (),
    seeds: Sequence[int] = SEEDS,
    sampling: Mapping[str, Any] | None = None,
    batch_size: int = BATCH,
    library: Library | str | Path = "adapters",
    folder: Path | None = None,
    force: bool = False,
    command: str = "",
    on_image: OnImage = None,
) -> Report:
    """Evaluate concepts by themselves and in a merge of them, and write the report; called again, it resumes.

    Args:
        adapters: one for each concept: adapters, paths, or names in the library.
        merged: a merge of them, to be compared with each.
        base: "" for the base model of the first adapter.
        suite, judge: "" for those that fit the base model.
        other_judges: judges of other kinds, such as "vision:facebook/dino-vits16".
        concepts: concepts besides the known ones, or folders of their images.
        sampling: changes of the base model's usual `Sampling`: steps, guidance, negative_prompt.
        folder: for images and report; None for one in ./evaluations, named after concepts and suite.
        force: delete the images of another evaluation in the folder.
        command: how the report says it was made.
        on_image: called with the number of images so far, and of all.

    Raises:
        SboraError: an unknown name or sampling setting, or whatever `run_evaluation` raises.
    """
    library = library if isinstance(library, Library) else Library(library)
    loaded = [_load(adapter, library) for adapter in adapters]
    merge = None if merged is None else _load(merged, library)
    if not loaded:
        raise SboraError("got no adapters, expected at least one")
    base_id = base.id if isinstance(base, Base) else base or loaded[0].spec.base_id
    default_suite, default_judge = default_suite_and_judge(base_id)
    suite = suite if isinstance(suite, Suite) else load_suite(suite or default_suite)
    folder = folder or EVALUATIONS / _folder_name(loaded, merge, merged, suite)
    base = base if isinstance(base, Base) else load_base(base_id, "")
    judges = [load_judge(each) if isinstance(each, str) else each for each in (judge or default_judge, *other_judges)]
    settings = {"sampling": _changed(base.sampling, sampling or {}), "seeds": seeds, "batch_size": batch_size}
    job = Evaluation(base, loaded, merge, suite, all_concepts(concepts), judges, **settings)
    try:
        report = run_evaluation(job, folder, force, on_image)
    except KeyboardInterrupt:
        again = f"resume with: {command}" if command else "the same call resumes"
        raise KeyboardInterrupt(f"stopped; the images so far are kept in {folder}; {again}") from None
    report = replace(report, about=report.about | ({"command": command} if command else {}))
    return replace(report, files=tuple(write_report(report, folder)))


def default_suite_and_judge(base_id: str) -> tuple[str, str]:
    """Return the suite and the judge for a base model; emoji64 has its own, as it knows only a small world."""
    return ("emoji64", "emoji-clip") if is_emoji64(base_id) else ("objects", "openai/clip-vit-base-patch32")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is evaluated, and how.

    Attributes:
        adapters: one for each concept.
        merged: a merge of the adapters, to be compared with each of them.
        suite: prompts for one concept at a time, or for all of `adapters` in one image.
        concepts: those of the adapters, by name, and others that an image may be mistaken for.
        judges: one of each kind; the first names the report.
        seeds: of every prompt and model alike, so single and merged differ by the weights only.
        batch_size: images generated at once.
    """

    base: Base
    adapters: Sequence[Adapter]
    merged: Adapter | None
    suite: Suite
    concepts: Sequence[Concept]
    judges: Sequence[Judge]
    sampling: Sampling
    seeds: Sequence[int] = SEEDS
    batch_size: int = BATCH


def run_evaluation(job: Evaluation, folder: Path, force: bool = False, on_image: OnImage = None) -> Report:
    """Generate the images that `folder` does not have yet, and score all of them; arguments as of `evaluate`.

    Raises:
        SboraError: nothing to evaluate, an adapter without its concept or for another base, a folder that belongs to
            another evaluation, a damaged image, a suite for another number of concepts.
    """
    _check(job)
    all_series, about = plan(job.suite, job.adapters, job.merged), _describe(job)
    older = replace(job, adapters=[*map(_older, job.adapters)], merged=job.merged and _older(job.merged))
    judge = job.judges[0]
    with claimed(
        folder, _identity(about, judge), force, _identity(about | _digests(older, with_digest=False), judge)
    ) as images:
        _generate_all(job, all_series, images, on_image)
        references = reference_images(job.concepts)
        scorer = prepare(job.judges, references)
        results = [result for series in all_series for result in _score(series, scorer, images, job.seeds)]
    names = [adapter.spec.name for adapter in job.adapters]
    return Report(
        title=f"{', '.join(names)} on {job.suite.name}, judged by {judge.id}",
        about=about,
        metrics={key: metric for each in job.judges for key, metric in each.metrics.items()},
        results=tuple(results),
        references={name: references[name] for name in names},
    )


def _load(adapter: Adapter | str | Path, library: Library) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else library.load(str(adapter))


def _folder_name(
    adapters: Sequence[Adapter], merge: Adapter | None, merged: Adapter | str | Path | None, suite: Suite
) -> str:
    parts = [adapter.spec.name for adapter in adapters]
    if merge:
        parts.append(f"in-{Path(merged).stem if isinstance(merged, (str, Path)) else merge.spec.name}")
    return "-".join([*parts, suite.name])


def _changed(usual: Sampling, changes: Mapping[str, Any]) -> Sampling:
    unknown = sorted(changes.keys() - vars(usual).keys())
    if unknown:
        raise SboraError(f"got unknown sampling setting {unknown[0]!r}", f"allowed are {', '.join(vars(usual))}")
    return replace(usual, **changes)


def _check(job: Evaluation) -> None:
    """Raise SboraError for what cannot be evaluated, before a folder is claimed."""
    if not job.adapters or not job.seeds:
        raise SboraError(f"got {len(job.adapters)} adapters and {len(job.seeds)} seeds, expected at least one of each")
    if job.batch_size < 1:
        raise SboraError(f"got batch_size={job.batch_size}, expected at least 1")
    job.base.choose_sampling(job.seeds, job.sampling.steps, job.sampling.guidance)
    known = {concept.name: concept for concept in job.concepts}
    for adapter in (*job.adapters, *([job.merged] if job.merged else [])):
        check_base(adapter, job.base)
    for adapter in job.adapters:
        own_token(adapter)
        name, recipe = adapter.spec.name, adapter.spec.recipe
        if name not in known:
            raise SboraError(f"no reference images of {name} were found", "give their folder: --concept DIR")
        if recipe.get("images") not in (None, image_digest(known[name])):
            log.warning("%s was trained with other images than its reference images here", name)


def _generate_all(job: Evaluation, all_series: Sequence[Series], images: Path, on_image: OnImage) -> None:
    counts = [len(series.prompts) * len(job.seeds) for series in all_series]
    for number, series in enumerate(all_series):
        for done in generate_missing(job.base, series, images, job.seeds, job.sampling, job.batch_size):
            if on_image:
                on_image(sum(counts[:number]) + done, sum(counts))


def _score(series: Series, scorer: Scorer, images: Path, seeds: Sequence[int]) -> list[Result]:
    files = series.files(images, seeds)
    prompts = [prompt for prompt in series.prompts for _ in seeds]
    opened = ImageFiles([path for row in files for path in row], read_image)
    found = scorer(opened, prompts, series.tokens, series.shown)
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


def _describe(job: Evaluation) -> dict[str, Any]:
    """Return everything needed to repeat the evaluation, in JSON values."""
    suite, base = job.suite, job.base
    return _digests(job) | {
        "suite": {"name": suite.name, "sha256": suite.sha256, "prompts": [prompt.text for prompt in suite.prompts]},
        "base": {"id": base.id, "fingerprint": base.fingerprint},
        **{judge.kind: {"id": judge.id, "weights": judge.weights} for judge in job.judges},
        "sampling": dict(vars(job.sampling)),
        "seeds": list(job.seeds),
        "dtype": str(base.denoiser.dtype).removeprefix("torch."),
        "device": base.device.type,
        "references": {c.name: {"images": len(c.images), "digest": image_digest(c)} for c in job.concepts},
        "versions": versions(),
    }


def _digests(job: Evaluation, with_digest: bool = True) -> dict[str, Any]:
    """Return the SHA-256 of the files of adapters and merge, by name; earlier versions' files held no digest."""
    own, merged = (
        {adapter.spec.name: hashlib.sha256(adapter.to_bytes(with_digest)).hexdigest() for adapter in some}
        for some in (job.adapters, [job.merged] if job.merged else [])
    )
    return {"adapters": own, "merged": merged or None}


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


def _older(adapter: Adapter) -> Adapter:
    """Return an adapter as earlier versions wrote it, with the older names of settings in its recipe."""
    return replace(adapter, spec=replace(adapter.spec, recipe=with_older_names(adapter.spec.recipe)))
