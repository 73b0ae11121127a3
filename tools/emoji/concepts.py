"""The concept folders shipped with the project: five frames of one animated emoji, each in another place.

One command, the same art gives the same bytes: `python -m tools.emoji.concepts [--data DIR] [--out DIR]`.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from tools.emoji import scenes
from tools.emoji.art import PACKAGES, Sources, cut_out, default_data_dir, fetch
from tools.emoji.world import Subject, caption, load_world

log = logging.getLogger(__name__)

SIDE = 256  # pixels of an image, and of a frame of the animations
SMOOTH = 4  # scenes are painted this much larger, then averaged
SCALES = (0.6, 0.66, 0.72, 0.78, 0.84)  # of the image's side, one for each image
COLOURED = 1  # images on a plain colour; the others stand in scenes
STYLED = 2  # captions that say "3d"; the others must not, so that the token alone carries the look

NOTICE = """\
The images in this folder show an animated emoji of Fluent Emoji (https://github.com/microsoft/fluentui-emoji),
drawn by Microsoft and packaged by LobeHub as {package} (npm, https://github.com/lobehub/fluent-emoji),
on backgrounds painted by sbora-diffusion. Both packagings of the art are under the following licence.

MIT License

Copyright (c) Microsoft Corporation.
Copyright (c) 2023 LobeHub

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@dataclass(frozen=True)
class Scene:
    """One image of a concept, where it was taken from and how it is captioned."""

    image: Image.Image
    frame: int
    place: str
    caption: str


def folder_name(subject: Subject) -> str:
    """`birthday cake` -> `birthday-cake`."""
    return subject.name.replace(" ", "-")


def distinct_frames(frames: Sequence[Image.Image], count: int) -> list[int]:
    """`count` frames that differ most: from the first on, always the one farthest from all chosen; in order."""
    pixels = np.stack([cut_out(frame, 64)[0] for frame in frames]).astype(np.float32)
    distance = np.full(len(frames), np.inf)
    chosen = [0]
    while len(chosen) < count:
        distance = np.minimum(distance, ((pixels - pixels[chosen[-1]]) ** 2).mean(axis=(1, 2, 3)))
        chosen.append(int(distance.argmax()))
    return sorted(chosen)


def compose(name: str, frames: Sequence[Image.Image]) -> list[Scene]:
    """The images of a concept, one for each of SCALES; `name` seeds every choice."""
    rng = Random(name)
    places = _places(rng, frames[0])
    scales = rng.sample(SCALES, len(SCALES))
    styled = rng.sample(range(len(SCALES)), STYLED)
    images = []
    for number, frame in enumerate(distinct_frames(frames, len(SCALES))):
        place, says = places[number]
        words = caption([f"<{name}>"], "3d" if number in styled else None, says)
        images.append(Scene(_image(frames[frame], place, scales[number], rng), frame, place, words))
    return images


def _places(rng: Random, subject: Image.Image) -> list[tuple[str, str]]:
    """Places in random order and how captions say them: painted scenes, and plain colours that set the subject off."""
    world = load_world()
    colours = sorted(world.colours, key=lambda name: _contrast(subject, world.colours[name]))
    plain = rng.sample(colours[len(colours) // 2 :], COLOURED)
    painted = rng.sample(list(world.scenes), len(SCALES) - COLOURED)
    says = world.scenes | {colour: f"on a {colour} background" for colour in plain}
    return [(place, says[place]) for place in rng.sample(painted + plain, len(SCALES))]


def _contrast(subject: Image.Image, colour: tuple[int, int, int]) -> float:
    """How far nine tenths of the subject's pixels are at least from a colour."""
    pixels = cut_out(subject, 64)[0].astype(float)
    visible = pixels[pixels[..., 3] == 255][:, :3]
    return float(np.quantile(np.abs(visible - colour).sum(1), 0.1))


def _image(frame: Image.Image, place: str, scale: float, rng: Random) -> Image.Image:
    """The subject at a random spot: its feet on the ground of a scene, in the middle of a plain colour."""
    size = round(SIDE * scale)
    pixels, width, height = cut_out(frame, size)
    image = _background(place, rng)
    room = (1 - width * scale) / 2 - 0.03
    x = 0.5 + rng.uniform(-1, 1) * min(0.09, room)
    y = rng.uniform(0.88, 0.94) - height * scale / 2 if place in scenes.PAINTERS else 0.5 + rng.uniform(-0.04, 0.04)
    corner = round(SIDE * x - size / 2), round(SIDE * y - size / 2)
    subject = Image.new("RGBa", (SIDE, SIDE))
    subject.paste(Image.frombuffer("RGBa", (size, size), pixels), corner)
    image.paste(subject.convert("RGBA"), mask=subject.getchannel("a"))
    return image


def _background(place: str, rng: Random) -> Image.Image:
    if place in scenes.PAINTERS:
        return Image.fromarray(scenes.paint(place, rng, SIDE * SMOOTH)).reduce(SMOOTH)
    return Image.new("RGB", (SIDE, SIDE), load_world().colours[place])


def write(folder: Path, subject: Subject, code: str, images: Sequence[Scene]) -> None:
    """Write a concept folder: images/1.png and so on, concept.toml, LICENSE."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, 1):
        image.image.save(folder / "images" / f"{number}.png", optimize=True)
    package = PACKAGES["fluent-anim"]
    (folder / "LICENSE").write_text(NOTICE.format(package=package))
    name, version = package.rsplit("@", 1)
    captions = "\n".join(f'"{number}.png" = "{image.caption}"' for number, image in enumerate(images, 1))
    (folder / "concept.toml").write_text(f"""\
name = "{folder.name}"
token = "<{folder.name}>"
class_noun = "{subject.name}"

[captions]
{captions}

[source]
package = "{name}"
version = "{version}"
emoji = "{code}"
frames = {[image.frame for image in images]}
licence = "MIT"
""")


def main() -> None:
    """Compose the concept folders from the Fluent animations."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, default=default_data_dir())
    parser.add_argument("--out", type=Path, default=Path("concepts"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    fetch(options.data)
    sources = Sources(options.data)
    for subject in load_world().subjects:
        if subject.is_concept:
            folder = options.out / folder_name(subject)
            images = compose(folder.name, sources.animation(subject.label))
            write(folder, subject, sources.code(subject.label), images)
            log.info("%s: frames %s", folder, [image.frame for image in images])


if __name__ == "__main__":
    main()
