"""Cut-outs of openly licensed emoji art: fetched from npm, rendered to premultiplied RGBA, named.

One command: `python -m tools.emoji.art [--data DIR]` (needs npm and the `emoji64` extra). It stores the art
of the base model's world and, apart, the wider art that the judge is trained on.
"""

import argparse
import io
import json
import logging
import os
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from sbora_diffusion.utils.errors import SboraError
from tools.emoji.world import Judge, Subject, load_world

log = logging.getLogger(__name__)

ART, WIDE_ART = "art.npz", "wide-art.npz"
SIZE = 256  # pixels of a cut-out's side
PACKAGES = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-anim": "@lobehub/fluent-emoji-anim-1@1.0.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "names": "emojibase-data@17.0.0",
}
SVG_SETS = {"flat": "fluent-flat", "cartoon": "noto", "drawing": "twemoji"}


@dataclass(frozen=True)
class CutOut:
    """What one image shows; `width` and `height` are the fractions of the square that the subject fills."""

    subject: str
    style: str
    tier: int
    width: float
    height: float
    held_out: bool


@dataclass(frozen=True)
class Art:
    """All cut-outs: `images` is (n, SIZE, SIZE, 4) uint8, premultiplied RGBA, in the order of `cutouts`."""

    images: np.ndarray
    cutouts: tuple[CutOut, ...]


def default_data_dir() -> Path:
    """Where the art and everything trained from it lies: $EMOJI_DATA or ~/.cache/sbora-diffusion/emoji."""
    return Path(os.environ.get("EMOJI_DATA", Path.home() / ".cache" / "sbora-diffusion" / "emoji"))


def fetch(data: Path) -> None:
    """Download and unpack the npm packages that are not there yet."""
    for folder, package in PACKAGES.items():
        target = data / "npm" / folder
        if target.exists():
            continue
        log.info("fetching %s", package)
        unpacked = target.with_suffix(".partial")
        unpacked.mkdir(parents=True, exist_ok=True)
        try:
            packed = subprocess.run(
                ["npm", "pack", package, "--silent", "--pack-destination", str(unpacked)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            raise SboraError(
                f"could not fetch {package} with npm: {error}", "install npm and check the network"
            ) from error
        archive = unpacked / packed.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        archive.unlink()
        unpacked.rename(target)


class Sources:
    """The unpacked packages, looked up by emojibase label."""

    def __init__(self, data: Path) -> None:
        self._root = data / "npm"
        entries = json.loads((self._package("names") / "en" / "data.json").read_text())
        self._entries = entries
        self._codes = {entry["label"]: entry["hexcode"].lower() for entry in entries}
        self._sets = {style: self._icon_set(name) for style, name in SVG_SETS.items()}

    def image(self, label: str, style: str) -> Image.Image | None:
        """The RGBA art of a subject in a style, or None where that style has none."""
        if style != "3d":
            return self._svg(label, style)
        path = self._webp("fluent-3d", label)
        return path and Image.open(path).convert("RGBA")

    def animation(self, label: str) -> list[Image.Image]:
        """All frames (RGBA) of the Fluent animation of a subject."""
        path = self._webp("fluent-anim", label)
        if path is None:
            raise SboraError(f"no animation of {label!r} in {PACKAGES['fluent-anim']}")
        return [frame.convert("RGBA") for frame in ImageSequence.Iterator(Image.open(path))]

    def code(self, label: str) -> str:
        """The code points of a subject's emoji, such as `1f415`."""
        if label not in self._codes:
            raise SboraError(f"unknown emoji label {label!r}", "use a label of emojibase-data's en/data.json")
        return self._codes[label]

    def labels(self, judge: Judge) -> list[str]:
        """The labels of the judge's groups: plain things, of at most three words."""
        return [
            entry["label"]
            for entry in self._entries
            if entry.get("group") in judge.groups
            and entry["subgroup"] not in judge.skip_subgroups
            and len(entry["label"].split()) <= 3
        ]

    def _package(self, folder: str) -> Path:
        return self._root / folder / "package"

    def _icon_set(self, folder: str) -> tuple[dict, dict[str, str]]:
        package = self._package(folder)
        return json.loads((package / "icons.json").read_text()), json.loads((package / "chars.json").read_text())

    def _spellings(self, label: str) -> Iterator[str]:
        code = self.code(label)
        yield from (code, code.replace("-fe0f", ""), f"{code}-fe0f")

    def _webp(self, folder: str, label: str) -> Path | None:
        paths = [self._package(folder) / "assets" / f"{code}.webp" for code in self._spellings(label)]
        return next((path for path in paths if path.exists()), None)

    def _svg(self, label: str, style: str) -> Image.Image | None:
        import resvg_py

        icons, chars = self._sets[style]
        name = next((chars[code] for code in self._spellings(label) if code in chars), None)
        if name is None:
            return None
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', icons.get('left', 0))} {icon.get('top', icons.get('top', 0))} {width} {height}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="512" height="512">{icon["body"]}</svg>'
        )
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def cut_out(image: Image.Image, size: int = SIZE) -> tuple[np.ndarray, float, float]:
    """Crop to what is visible and centre it in a square.

    Returns:
        (size, size, 4) uint8 premultiplied RGBA, and the fractions of the square's width and height it fills.
    """
    box = image.getchannel("A").point([255 * (value > 8) for value in range(256)]).getbbox()
    if box is None:
        raise SboraError("got an empty (fully transparent) image")
    image = image.crop(box).convert("RGBa")
    scale = (size - 4) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGBa", (size, size))
    square.paste(image.resize((width, height), Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2))
    return np.array(square), width / size, height / size


def build(data: Path) -> Art:
    """Render every subject of the world in every style and store it as `art.npz` in the data folder."""
    fetch(data)
    art = _render(Sources(data), load_world().subjects, ())
    save_art(art, data)
    return art


def build_wide(data: Path) -> Art:
    """The same for the world's subjects and all that the judge sees besides, as `wide-art.npz`."""
    sources, world = Sources(data), load_world()
    known = {subject.label for subject in world.subjects}
    others = [Subject(label, label.lower(), 0, False) for label in sources.labels(world.judge) if label not in known]
    names = [subject.name for subject in (*world.subjects, *others)]
    twice = {name for name in names if names.count(name) > 1}  # the world's "ice cream" is not emojibase's
    others = [subject for subject in others if subject.name not in twice]
    art = _render(sources, (*world.subjects, *others), world.judge.held_out)
    save_art(art, data, WIDE_ART)
    return art


def _render(sources: "Sources", subjects: Sequence[Subject], held_out: Sequence[str]) -> Art:
    """Every subject in every style that there is; the world's held-out art and these subjects are marked as such."""
    images, cutouts = [], []
    world = load_world()
    for subject in subjects:
        for style in world.styles:
            image = sources.image(subject.label, style)
            if image is None:
                log.warning("no %s art of %s", style, subject.name)
                continue
            pixels, width, height = cut_out(image)
            images.append(pixels)
            held = world.held_out(subject.name, style) or subject.name in held_out
            cutouts.append(CutOut(subject.name, style, subject.tier, width, height, held))
    return Art(np.stack(images), tuple(cutouts))


def save_art(art: Art, data: Path, name: str = ART) -> None:
    """Store all cut-outs in the data folder."""
    np.savez(data / name, images=art.images, cutouts=json.dumps([asdict(cutout) for cutout in art.cutouts]))


def load_art(data: Path, name: str = ART) -> Art:
    """The inverse of `save_art`."""
    path = data / name
    if not path.exists():
        raise SboraError(f"no {name} in {data}", "run: python -m tools.emoji.art")
    with np.load(path) as stored:
        return Art(stored["images"], tuple(CutOut(**entry) for entry in json.loads(str(stored["cutouts"]))))


def main() -> None:
    """Fetch and render all art."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, default=default_data_dir())
    data = parser.parse_args().data
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for name, art in ((ART, build(data)), (WIDE_ART, build_wide(data))):
        held = sum(cutout.held_out for cutout in art.cutouts)
        log.info("%d cut-outs, %d of them held out, in %s", len(art.cutouts), held, data / name)


if __name__ == "__main__":
    main()
