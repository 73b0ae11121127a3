"""What lies in a folder of images: images, their masks and captions; whatever is not used is named in a warning."""

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from unicodedata import normalize

from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_bytes
from sbora_diffusion.utils.text import parse_json

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
CAPTIONS = (".txt", ".caption")  # dog.txt or dog.jpg.txt beside dog.jpg
METADATA = "metadata.jsonl"  # of Hugging Face's image folders
METADATA_KEYS = ("text", "caption", "prompt")
OURS = ("concept.toml", "license", "licence", "readme", "notice")
_MASK = re.compile(r"(.+)(\.mask|-masklabel|[_-]mask)", re.IGNORECASE)  # dog.mask.png, dog-masklabel.png, dog_mask.png
_ALWAYS_MASKS = (".mask", "-masklabel")
_MASK_FOLDERS = ("masks", "mask")


def image_files(folder: Path) -> list[Path]:
    """Return the images in `images/`, or in the folder itself, sorted by name; warn about everything else.

    Raises:
        SboraError: an unreadable folder, or one without images.
    """
    directory = folder / "images" if (folder / "images").is_dir() else folder
    found = _visible(directory)
    images = without_masks([path for path in found if path.is_file() and path.suffix.lower() in EXTENSIONS])
    if not images:
        raise _no_image(directory, found)
    outside = [path for path in _visible(folder) if path.name != "images"] if directory != folder else []
    used = {*images, *(path for image in images for path in (mask_file(image), *_caption_files(image, found)) if path)}
    unused = [_described(path) for path in [*found, *outside] if path not in used and not _is_ours(path)]
    if unused:
        log.warning("not used in %s: %s", folder, ", ".join(unused))
    return images


def without_masks(files: Sequence[Path]) -> list[Path]:
    """Return the images to learn from, without the masks among them."""
    stems = {path.stem for path in files}
    return [path for path in files if not _is_mask(path, stems)]


def mask_file(image: Path) -> Path | None:
    """Return the mask beside an image, or in the folder `masks` or `mask` beside it or its folder `images`."""
    folder = image.parents[1] if image.parent.name == "images" else image.parent
    names = [image.with_name(image.stem + mark) for mark in (*_ALWAYS_MASKS, "_mask", "-mask")]
    names += [folder / kind / image.stem for kind in _MASK_FOLDERS]
    files = (name.with_name(name.name + extension) for name in names for extension in (".png", *EXTENSIONS))
    return next((path for path in files if path.is_file()), None)


def captions_beside(images: Sequence[Path]) -> dict[Path, str]:
    """Return the captions in files beside images: dog.txt, dog.caption, dog.jpg.txt, or metadata.jsonl.

    Raises:
        SboraError: an unreadable file, one for two images, or two for one image.
    """
    if not images:
        return {}
    found = _visible(images[0].parent)
    files = {image: _caption_files(image, found) for image in images}
    listed = _read_metadata(images[0].parent / METADATA)
    captions = {image: listed[name] for image in images if (name := normalize("NFC", image.name)) in listed}
    for image, own in files.items():
        if len(own) > 1:
            raise SboraError(f"{image} has {len(own)} captions, {own[0].name} and {own[1].name}", "keep one of them")
        if own:
            captions[image] = " ".join(_read_text(own[0]).split())
    return captions


def shared_captions(images: Collection[Path]) -> Path | None:
    """Return a caption file that belongs to two of these images, or None."""
    seen: set[Path] = set()
    for image in images:
        for file in _caption_files(image, _visible(image.parent)):
            if file in seen:
                return file
            seen.add(file)
    return None


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    except OSError as error:
        raise SboraError(f"cannot read the folder {folder}: {error.strerror}") from error


def _is_mask(path: Path, stems: Collection[str]) -> bool:
    match = _MASK.fullmatch(path.stem)
    return match is not None and (match[1] in stems or match[2].lower() in _ALWAYS_MASKS)


def _is_ours(path: Path) -> bool:
    """Return whether a file is no material: a description, a licence, a folder of masks."""
    return path.name.lower() in (*_MASK_FOLDERS, METADATA) or path.name.lower().startswith(OURS)


def _caption_files(image: Path, among: Sequence[Path]) -> list[Path]:
    names = {normalize("NFC", name) for name in (image.stem, image.name)}
    return [path for path in among if path.suffix.lower() in CAPTIONS and normalize("NFC", path.stem) in names]


def _described(path: Path) -> str:
    if not path.is_dir():
        return path.name if path.exists() else f"{path.name} (a broken link)"
    count = sum(inner.suffix.lower() in EXTENSIONS for inner in path.rglob("*"))
    return f"the folder {path.name}" + (f" ({count} images)" if count else "")


def _no_image(directory: Path, found: Sequence[Path]) -> SboraError:
    got = ", ".join(_described(path) for path in found[:4]) or "nothing"
    filled = [path for path in found if path.is_dir() and without_masks(_images_in(path))]
    hint = f"put images there; allowed are {', '.join(EXTENSIONS)}"
    return SboraError(f"no image in {directory}: got {got}", f"give the folder {filled[0]}" if filled else hint)


def _images_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS]


def _read_text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SboraError(f"cannot read the caption file {file}: {error}", "save it as UTF-8 text") from error


def _read_metadata(file: Path) -> dict[str, str]:
    """Return image file name -> caption of a metadata.jsonl; empty if there is none."""
    captions = {}
    for number, line in enumerate(_read_text(file).splitlines() if file.is_file() else (), 1):
        try:
            entry = dict(parse_json(line)) if line.strip() else {}
            caption = next((entry[key] for key in METADATA_KEYS if key in entry), None)
            if caption is not None:
                captions[normalize("NFC", entry["file_name"])] = " ".join(caption.split())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SboraError(
                f"cannot read line {number} of {file} ({error})", 'write {"file_name": "a.jpg", "text": "a <mug>"}'
            ) from None
    return captions
