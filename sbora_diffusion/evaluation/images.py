"""The images of an evaluation: which are needed, how they are generated and kept, and the reference images."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept, default_roots, known_concepts, load_concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.evaluation.suites import Suite
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.models.base import Base
from sbora_diffusion.models.families.base import Sampling
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import folder_held, read_json, write_file

IMAGES, MANIFEST = "images", "evaluation.json"
_OLDER_IMAGES = "pictures"  # until November 2026


def all_concepts(extra: Iterable[str | Concept] = ()) -> list[Concept]:
    """Return all known concepts and `extra` ones, which replace known ones of their name."""
    logger = logging.getLogger("sbora_diffusion.data.concept")  # logs the same notice for every concept
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        known = [load_concept(name, default_roots()) for name in known_concepts(default_roots())]
    finally:
        logger.setLevel(level)
    named = [load_concept(each, default_roots()) if isinstance(each, str) else each for each in extra]
    return list({concept.name: concept for concept in [*known, *named]}.values())


def reference_images(concepts: Iterable[Concept]) -> dict[str, list[Image.Image]]:
    """Read all images of each concept's folder, by the concept's name."""
    return {concept.name: [load_image(image.path) for image in concept.images] for concept in concepts}


@dataclass(frozen=True, eq=False)
class Series:
    """The prompts of a suite, with the tokens of some concepts, for one model.

    Attributes:
        model, shown: as of `report.Result`.
        adapters: what is applied to the base model.
        tokens: token in the prompts -> class noun.
    """

    model: str
    shown: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    tokens: dict[str, str]
    prompts: tuple[str, ...]

    def files(self, images: Path, seeds: Sequence[int]) -> tuple[tuple[Path, ...], ...]:
        """Return the images' paths by prompt and seed: "<prompt's number>-<seed>.png" in the series' own folder."""
        folder = images / self.model / "+".join(self.shown)
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
    own = [own_token(adapter) for adapter in adapters]
    nouns = [adapter.spec.tokens[token] for adapter, token in zip(adapters, own, strict=True)]
    in_merge = [merged_token(merged, adapter) for adapter in adapters] if merged else []

    def series(model: str, applying: Sequence[Adapter], tokens: Sequence[str], which: slice) -> Series:
        shown = dict(zip(tokens[which], nouns[which], strict=True))
        return Series(model, names[which], tuple(applying), shown, tuple(suite.bind(tokens[which])))

    if suite.num_concepts > 1:
        model, applying, tokens = ("merged", [merged], in_merge) if merged else ("together", adapters, own)
        return [series(model, applying, tokens, slice(None))]
    each = [slice(n, n + 1) for n in range(len(names))]
    single = [series("single", adapters[one], own, one) for one in each]
    return single + [series("merged", [merged], in_merge, one) for one in each if merged]


def merged_token(merged: Adapter, adapter: Adapter) -> str:
    """Return a concept's token in a merge, which renames a token that several of its parents have.

    It is found by its learned embedding, which a merge does not change.

    Raises:
        SboraError: the merge has no such concept.
    """
    token = own_token(adapter)
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


def own_token(adapter: Adapter) -> str:
    """Return the token of a single concept's adapter; raise SboraError for a merge."""
    spec = adapter.spec
    if len(spec.tokens) != 1:
        raise SboraError(
            f"{spec.name!r} has the tokens {', '.join(spec.tokens) or 'none'}, expected the adapter of one concept",
            "give the names of single concepts, and the merge as --merged FILE",
        )
    return next(iter(spec.tokens))


def generate_missing(
    base: Base, series: Series, images: Path, seeds: Sequence[int], sampling: Sampling, batch_size: int
) -> Iterator[int]:
    """Generate the missing images; yield the number of images so far, first before any new one is generated.

    Batches are formed as if all images were missing, seed by seed, so an image is bitwise the same whenever it is
    generated, and more seeds can be added later.
    """
    rows = list(zip(series.files(images, seeds), series.prompts, strict=True))
    jobs = [(files[column], prompt, seed) for column, seed in enumerate(seeds) for files, prompt in rows]
    done = sum(path.exists() for path, _, _ in jobs)
    yield done
    if done == len(jobs):
        return
    with applied(base, series.adapters):
        for start in range(0, len(jobs), batch_size):
            paths, prompts, numbers = zip(*jobs[start : start + batch_size], strict=True)
            missing = [path for path in paths if not path.exists()]
            if missing:
                generated = generate(base, prompts, seeds=numbers, **vars(sampling))
                for path, image in zip(paths, generated, strict=True):
                    if path in missing:
                        write_image(image, path)
                done += len(missing)
                yield done


class ImageFiles(Sequence[Image.Image]):
    """Images in files, each read only when it is accessed, so that few are in memory at a time."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Image.Image]) -> None:
        self._paths, self._read = paths, read

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self._read(path) for path in self._paths[index]]
        return self._read(self._paths[index])


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG; if the process is killed at any moment, the file is complete or absent."""
    write_file(path, partial(image.save, format="png"), overwrite=True)


def read_image(path: Path) -> Image.Image:
    """Read an image of this evaluation as RGB, of any size; SboraError if it is missing or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            return file.convert("RGB")
    except Exception as error:  # decoders of damaged files raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SboraError(f"cannot read {path}: {reason}", "delete it and run the evaluation again") from error


@contextmanager
def claimed(
    folder: Path, identity: Mapping[str, Any], force: bool = False, older: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Hold a folder for one evaluation, begun here or in an earlier process; yield the folder of its images.

    Args:
        identity: what the images depend on, in JSON values; it differs between evaluations.
        force: delete the images of another evaluation.
        older: what an earlier version wrote as the identity of the same evaluation.

    Raises:
        SboraError: the folder has another evaluation's images, or another process holds it.
    """
    images = folder / IMAGES
    with folder_held(folder, "evaluation", "wait for it, or choose another --out"):
        if (folder / _OLDER_IMAGES).is_dir() and not images.exists():
            (folder / _OLDER_IMAGES).rename(images)
        for path in folder.rglob(".*.tmp"):  # left by a killed process
            path.unlink()
        if images.exists():
            defect = _difference(folder / MANIFEST, identity)
            if defect and not (older and not _difference(folder / MANIFEST, older)):
                if not force:
                    raise SboraError(f"{folder} {defect}", "choose another --out, or delete its images with --force")
                shutil.rmtree(images)
        write_file(folder / MANIFEST, json.dumps(identity, indent=2, sort_keys=True).encode(), overwrite=True)
        yield images


def _difference(manifest: Path, identity: Mapping[str, Any]) -> str | None:
    """Return why the images of the manifest are not this evaluation's, or None."""
    try:
        before = read_json(manifest)
        found = {key: json.dumps(before.get(key)) for key in {*identity, *before}}
    except FileNotFoundError:
        return f"has images, but no {MANIFEST} that says which evaluation they belong to"
    except (SboraError, AttributeError, TypeError):
        return f"has a damaged {MANIFEST}"
    here = {key: json.dumps(identity.get(key)) for key in found}
    changed = [f"{key} ({found[key]} there, {here[key]} here)" for key in sorted(found) if found[key] != here[key]]
    return f"holds another evaluation: it differs in {', '.join(changed)}" if changed else None
