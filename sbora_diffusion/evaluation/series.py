"""The images that an evaluation needs: for each model and concept a series, every prompt with every seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.evaluation.gallery import write_image
from sbora_diffusion.evaluation.suites.suite import Suite
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.utils.errors import SboraError


@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """The prompts of a suite, with the tokens of some concepts, for one model.

    Attributes:
        model, shown: as of `reports.results.Result`.
        adapters: what is applied to the base model.
        tokens: token in the prompts -> class noun.
    """

    model: str
    shown: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    tokens: dict[str, str]
    prompts: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The series' own folder in the folder of images."""
        return f"{self.model}/{'+'.join(self.shown)}"

    def files(self, images: Path, seeds: Sequence[int]) -> tuple[tuple[Path, ...], ...]:
        """Return the images' paths by prompt and seed: "<prompt's number>-<seed>.png"."""
        folder = images / self.folder
        return tuple(tuple(folder / f"{n:03d}-{seed}.png" for seed in seeds) for n in range(len(self.prompts)))


def plan(suite: Suite, adapters: Sequence[Adapter], merged: Adapter | None) -> list[Series]:
    """Return the series of an evaluation.

    With a suite for one concept: each concept by its own adapter, then each by the merge. With a joint suite: all
    concepts in each image, by the merge, or without one by all adapters at once.

    Raises:
        SboraError: an adapter that is a merge itself, two of one name, a joint suite for another number of concepts, a
            merge that lacks a concept.
    """
    names = tuple(adapter.spec.name for adapter in adapters)
    if len(set(names)) < len(names):
        raise SboraError(f"got two adapters of one name: {', '.join(names)}", "evaluate them one after the other")
    own = [_own_token(adapter) for adapter in adapters]
    nouns = [adapter.spec.tokens[token] for adapter, token in zip(adapters, own, strict=True)]
    in_merge = [merged_token(merged, adapter) for adapter in adapters] if merged else []
    if suite.num_concepts > 1:
        model, applying, tokens = ("merged", (merged,), in_merge) if merged else ("together", tuple(adapters), own)
        return [_series(model, suite, names, applying, tokens, nouns)]
    series = [
        _series("single", suite, (name,), (adapter,), [token], [noun])
        for name, adapter, token, noun in zip(names, adapters, own, nouns, strict=True)
    ]
    if merged:
        pairs = zip(names, in_merge, nouns, strict=True)
        series += [_series("merged", suite, (name,), (merged,), [token], [noun]) for name, token, noun in pairs]
    return series


def merged_token(merged: Adapter, adapter: Adapter) -> str:
    """Return a concept's token in a merge, which renames a token that several of its parents have.

    It is found by its learned embedding, which a merge does not change.

    Raises:
        SboraError: the merge has no such concept.
    """
    token = _own_token(adapter)
    learned = adapter.tokens.get(f"text_encoder.{token}")
    for candidate in merged.spec.tokens:
        embedding = merged.tokens.get(f"text_encoder.{candidate}")
        if learned is not None and embedding is not None and torch.equal(embedding, learned):
            return candidate
    raise SboraError(
        f"the merge {merged.spec.name!r} does not contain {token} of {adapter.spec.name!r}; "
        f"it was merged from {', '.join(merged.spec.parents) or 'nothing'}",
        "merge again: sbora-diffusion merge",
    )


def generate_missing(
    base: Base, series: Series, images: Path, seeds: Sequence[int], sampling: Sampling, batch_size: int
) -> Iterator[int]:
    """Generate the missing images; yield the number of images so far, first before any new one is generated.

    Batches are formed as if all images were missing, seed by seed, so an image is bitwise the same whenever it is
    generated, and more seeds can be added later.
    """
    files = series.files(images, seeds)
    jobs = [
        (row[column], prompt, seed)
        for column, seed in enumerate(seeds)
        for row, prompt in zip(files, series.prompts, strict=True)
    ]
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    done = sum(path.exists() for path, _, _ in jobs)
    yield done
    if done == len(jobs):
        return
    with applied(base, series.adapters):
        for batch in batches:
            missing = [path for path, _, _ in batch if not path.exists()]
            if missing:
                for path, image in _generate(base, batch, sampling):
                    if path in missing:
                        write_image(image, path)
                done += len(missing)
                yield done


def _generate(
    base: Base, batch: Sequence[tuple[Path, str, int]], sampling: Sampling
) -> Iterator[tuple[Path, Image.Image]]:
    paths, prompts, seeds = zip(*batch, strict=True)
    return zip(paths, generate(base, prompts, seeds=seeds, **vars(sampling)), strict=True)


def _own_token(adapter: Adapter) -> str:
    spec = adapter.spec
    if len(spec.tokens) != 1:
        has = ", ".join(spec.tokens) or "none"
        raise SboraError(
            f"{spec.name!r} has the tokens {has}, expected the adapter of one concept",
            "give the names of single concepts, and the merge as --merged FILE",
        )
    return next(iter(spec.tokens))


def _series(
    model: str,
    suite: Suite,
    shown: Sequence[str],
    adapters: Sequence[Adapter],
    tokens: Sequence[str],
    nouns: Sequence[str],
) -> Series:
    return Series(
        model=model,
        shown=tuple(shown),
        adapters=tuple(adapters),
        tokens=dict(zip(tokens, nouns, strict=True)),
        prompts=tuple(suite.bind(tokens)),
    )
