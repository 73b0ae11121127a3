"""The images of an evaluation on disk: one evaluation to a folder, every image complete or absent."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import folder_held, write_file

IMAGES, MANIFEST = "images", "evaluation.json"
_OLDER_IMAGES = "pictures"  # until November 2026


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
    with folder_held(folder, "evaluation", "wait for it, or choose another --out"):
        _take_over(folder, identity, force, older)
        yield folder / IMAGES


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG; if the process is killed at any moment, the file is complete or absent."""
    write_file(path, partial(image.save, format="png"), overwrite=True)


def read_image(path: Path) -> Image.Image:
    """Read an image of this evaluation as RGB, of any size.

    Raises:
        SboraError: it is missing or damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as file:
            return file.convert("RGB")
    except Exception as error:  # decoders of damaged files raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SboraError(f"cannot read {path}: {reason}", "delete it and run the evaluation again") from error


def _take_over(folder: Path, identity: Mapping[str, Any], force: bool, older: Mapping[str, Any] | None) -> None:
    images, manifest = folder / IMAGES, folder / MANIFEST
    if (folder / _OLDER_IMAGES).is_dir() and not images.exists():
        (folder / _OLDER_IMAGES).rename(images)
    for path in folder.rglob(".*.tmp"):  # left by a killed process
        path.unlink()
    defect = _difference(images, manifest, identity)
    if defect and older and not _difference(images, manifest, older):
        defect = None
    if defect and not force:
        raise SboraError(f"{folder} {defect}", "choose another --out, or delete its images with --force")
    if defect:
        shutil.rmtree(images, ignore_errors=True)
    write_file(manifest, json.dumps(identity, indent=2, sort_keys=True).encode(), overwrite=True)


def _difference(images: Path, manifest: Path, identity: Mapping[str, Any]) -> str | None:
    """Return why the images in the folder are not this evaluation's, or None."""
    if not images.exists():
        return None
    try:
        before = json.loads(manifest.read_bytes())
        found = {key: json.dumps(before.get(key)) for key in {*identity, *before}}
    except FileNotFoundError:
        return f"has images, but no {MANIFEST} that says which evaluation they belong to"
    except (ValueError, AttributeError, TypeError):
        return f"has a damaged {MANIFEST}"
    here = {key: json.dumps(identity.get(key)) for key in found}
    changed = [f"{key} ({found[key]} there, {here[key]} here)" for key in sorted(found) if found[key] != here[key]]
    return f"holds another evaluation: it differs in {', '.join(changed)}" if changed else None
