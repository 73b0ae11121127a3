"""The images of an evaluation on disk: whose they are, which of them are there, each one whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.locks import folder_held

IMAGES, MANIFEST = "images", "evaluation.json"


@contextmanager
def claimed(folder: Path, identity: Mapping[str, Any], force: bool = False) -> Iterator[Path]:
    """Hold a folder for one evaluation, begun here or in an earlier process; gives the folder of its images.

    Args:
        identity: what the images depend on, in JSON values; another evaluation's folder has another one.
        force: throw the images of another evaluation away.

    Raises:
        SboraError: another evaluation's images lie there, or another process is at work there.
    """
    with folder_held(folder, "evaluation", "wait for it, or choose another --out"):
        _take_over(folder, identity, force)
        yield folder / IMAGES


def write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG; a kill at any moment leaves the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        image.save(file, format="png")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_image(path: Path) -> Image.Image:
    """An image of this evaluation as RGB, of any size.

    Raises:
        SboraError: it is missing or damaged.
    """
    try:
        with Image.open(path, formats=["PNG"]) as file:
            return file.convert("RGB")
    except Exception as error:  # decoders of damaged files raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SboraError(f"cannot read {path}: {reason}", "delete it and run the evaluation again") from error


def write_text(text: str, path: Path) -> None:
    """The same for a text."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _take_over(folder: Path, identity: Mapping[str, Any], force: bool) -> None:
    images, manifest = folder / IMAGES, folder / MANIFEST
    defect = _difference(images, manifest, identity)
    if defect and not force:
        raise SboraError(f"{folder} {defect}", "choose another --out, or throw its images away with --force")
    if defect:
        shutil.rmtree(images, ignore_errors=True)
    write_text(json.dumps(identity, indent=2, sort_keys=True), manifest)


def _difference(images: Path, manifest: Path, identity: Mapping[str, Any]) -> str | None:
    """What keeps the images that are there from being this evaluation's."""
    if not images.exists():
        return None
    try:
        before = json.loads(manifest.read_bytes())
        there = {key: json.dumps(before.get(key)) for key in {*identity, *before}}
    except FileNotFoundError:
        return f"has images, but no {MANIFEST} that tells whose they are"
    except (ValueError, AttributeError, TypeError):
        return f"has a damaged {MANIFEST}"
    here = {key: json.dumps(identity.get(key)) for key in there}
    changed = [f"{key} ({there[key]} there, {here[key]} here)" for key in sorted(there) if there[key] != here[key]]
    return f"holds another evaluation: it differs in {', '.join(changed)}" if changed else None
