"""Evaluate concepts by name: find adapters, suite and judge, run the evaluation, and write its report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept
from sbora_diffusion.evaluation.judges.base import Judge
from sbora_diffusion.evaluation.judges.registry import load_judge
from sbora_diffusion.evaluation.references import all_concepts
from sbora_diffusion.evaluation.reports.report import write_report
from sbora_diffusion.evaluation.reports.results import Report
from sbora_diffusion.evaluation.run import BATCH, run_evaluation
from sbora_diffusion.evaluation.suites.suite import Suite, load_suite
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.models.loading import is_emoji64
from sbora_diffusion.utils.errors import SboraError

SEEDS = range(4)  # images of each prompt
EVALUATIONS = Path("evaluations")


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
    on_image: Callable[[int, int], None] | None = None,
) -> Report:
    """Evaluate concepts by themselves and in a merge of them, and write the report.

    Called again with the same arguments after an interruption, it resumes: images in the folder are not generated anew.

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
    if not loaded:
        raise SboraError("got no adapters, expected at least one")
    merge = None if merged is None else _load(merged, library)
    base_id = base.id if isinstance(base, Base) else base or loaded[0].spec.base_id
    default_suite, default_judge = default_suite_and_judge(base_id)
    suite = suite if isinstance(suite, Suite) else load_suite(suite or default_suite)
    folder = folder or EVALUATIONS / _folder_name(loaded, merge, merged, suite)
    base = base if isinstance(base, Base) else load_base(base_id, "")
    named = (judge or default_judge, *other_judges)
    judges = [load_judge(each) if isinstance(each, str) else each for each in named]
    try:
        report = run_evaluation(
            base,
            loaded,
            suite,
            all_concepts(concepts),
            judges,
            seeds,
            folder,
            merged=merge,
            sampling=_changed(base.sampling, sampling or {}),
            batch_size=batch_size,
            force=force,
            on_image=on_image,
        )
    except KeyboardInterrupt:
        again = f"resume with: {command}" if command else "the same call resumes"
        raise KeyboardInterrupt(f"stopped; the images so far are kept in {folder}; {again}") from None
    report = replace(report, about=report.about | ({"command": command} if command else {}))
    return replace(report, files=tuple(write_report(report, folder)))


def default_suite_and_judge(base_id: str) -> tuple[str, str]:
    """Return the suite and the judge for a base model; emoji64 has its own, as it knows only a small world."""
    return ("emoji64", "emoji-clip") if is_emoji64(base_id) else ("objects", "openai/clip-vit-base-patch32")


def _load(adapter: Adapter | str | Path, library: Library) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else library.load(str(adapter))


def _folder_name(
    adapters: Sequence[Adapter], merge: Adapter | None, merged: Adapter | str | Path | None, suite: Suite
) -> str:
    parts = [adapter.spec.name for adapter in adapters]
    if merge:
        parts.append(f"in-{merge.spec.name if isinstance(merged, (Adapter, type(None))) else Path(merged).stem}")
    return "-".join([*parts, suite.name])


def _changed(usual: Sampling, changes: Mapping[str, Any]) -> Sampling:
    unknown = sorted(changes.keys() - vars(usual).keys())
    if unknown:
        raise SboraError(f"got unknown sampling setting {unknown[0]!r}", f"allowed are {', '.join(vars(usual))}")
    return replace(usual, **changes)
