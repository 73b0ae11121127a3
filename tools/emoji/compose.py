"""Captioned scenes, composed on the fly from cut-outs and backgrounds by batched grid sampling."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tools.emoji import scenes
from tools.emoji.art import Art
from tools.emoji.world import caption, load_world

RESOLUTION = 128  # pixels of an image's side, unless a smaller one is asked for
CANVAS = 256  # pixels of the side at which images are composed, then averaged down
SIDE = 64  # the side of an image in the units of all sizes and positions below
CENTRE = SIDE / 2


@dataclass(frozen=True, kw_only=True)
class Variety:
    """How much composed images differ: the curriculum widens it.

    Sizes and shifts are in 64ths of the image's side; the rest are probabilities.
    """

    tiers: int = 1
    size: tuple[float, float] = (48, 52)
    shift: float = 1.0
    flip: float = 0.0
    pairs: float = 0.0
    plain: float = 0.4
    styleless: float = 0.0


@dataclass(frozen=True)
class Placed:
    """One cut-out on the canvas: centre and size in 64ths of the image's side."""

    pixels: Tensor  # (4, CANVAS, CANVAS) uint8, premultiplied RGBA
    x: float
    y: float
    size: float
    flipped: bool


@dataclass(frozen=True)
class Plan:
    """What an image will show; `subjects`, `style` and `place` are its true labels."""

    background: Tensor  # (3, CANVAS, CANVAS) uint8
    parts: tuple[Placed, ...]
    caption: str
    subjects: tuple[str, ...]
    style: str
    place: str


def painted(name: str, rng: Random) -> np.ndarray:
    """Paint one variant of a scene with smooth edges: (CANVAS, CANVAS, 3) uint8 sRGB."""
    return np.array(Image.fromarray(scenes.paint(name, rng, 2 * CANVAS)).reduce(2))


class Backgrounds:
    """Painted scenes (a pool of variants) and plain colours."""

    def __init__(self, rng: Random, variants: int) -> None:
        self._rng = rng
        self._world = load_world()
        self._pool = {
            name: [torch.from_numpy(painted(name, rng)).permute(2, 0, 1).contiguous() for _ in range(variants)]
            for name in self._world.scenes
        }

    def draw(self, name: str) -> tuple[Tensor, str]:
        """A (3, CANVAS, CANVAS) uint8 background and how a caption says it."""
        if name in self._pool:
            image = self._rng.choice(self._pool[name])
            return (image.flip(-1) if self._rng.random() < 0.5 else image), self._world.scenes[name]
        colour = [min(255, max(0, value + self._rng.uniform(-6, 6))) for value in self._world.colours[name]]
        plain = torch.tensor(colour).to(torch.uint8).view(3, 1, 1).expand(3, CANVAS, CANVAS)
        return plain, f"on a {name} background"


def places(subjects: Sequence[str], style: str, *, withheld: bool) -> list[str]:
    """The scenes and colours in which these subjects may be composed for training, or those kept for tests.

    About every tenth combination of subjects, style and place is kept: which ones is fixed by a hash of their names.
    """
    world = load_world()
    keys = {place: ",".join([*sorted(subjects), style, place]).encode() for place in (*world.scenes, *world.colours)}
    return [place for place, key in keys.items() if (hashlib.blake2b(key).digest()[0] < 26) == withheld]


class Composer:
    """An endless, seeded source of captioned images; held-out art never enters unless it is passed in."""

    def __init__(self, art: Art, seed: int, variety: Variety, variants: int = 48) -> None:
        self.rng = Random(seed)
        self.variety = variety
        self.backgrounds = Backgrounds(self.rng, variants)
        kept = [i for i, c in enumerate(art.cutouts) if not c.held_out and c.tier < variety.tiers]
        self.cutouts = [art.cutouts[i] for i in kept]
        self._images = torch.from_numpy(art.images[kept]).permute(0, 3, 1, 2).contiguous()
        self._by_style = {
            style: [i for i, c in enumerate(self.cutouts) if c.style == style] for style in load_world().styles
        }

    def batch(self, count: int) -> tuple[Tensor, list[Plan]]:
        """`count` images, (count, 3, RESOLUTION, RESOLUTION) float32 in [-1, 1], and their plans."""
        plans = [self.plan() for _ in range(count)]
        return render(plans), plans

    def plan(self) -> Plan:
        """Choose what the next image shows, never a combination that is kept for tests."""
        first = self.rng.randrange(len(self.cutouts))
        if self.rng.random() < self.variety.pairs:
            return self.plan_pair(first, self.rng.choice(self._by_style[self.cutouts[first].style]))
        return self.plan_single(first)

    def plan_single(self, number: int, place: str | None = None) -> Plan:
        """One cut-out, near the middle; anywhere that is not kept for tests, if no place is given."""
        cutout = self.cutouts[number]
        place = place or self._place((cutout.subject,), cutout.style)
        shift = self.variety.shift
        x, y = CENTRE + self.rng.uniform(-shift, shift), CENTRE + 1 + self.rng.uniform(-shift, shift)
        part = Placed(self._images[number], x, y, self.rng.uniform(*self.variety.size), self._flip())
        return self._finish((part,), (self.cutouts[number].subject,), self.cutouts[number].style, place)

    def plan_pair(self, left: int, right: int, place: str | None = None) -> Plan:
        """Two cut-outs of one style side by side on the ground; places as in `plan_single`."""
        style = self.cutouts[left].style
        place = place or self._place((self.cutouts[left].subject, self.cutouts[right].subject), style)
        ground = self.rng.uniform(51, 55)
        parts = []
        for number, x in ((left, 17), (right, 47)):
            size = self.rng.uniform(27, 33)
            y = ground - size * self.cutouts[number].height / 2
            parts.append(Placed(self._images[number], x + self.rng.uniform(-1.5, 1.5), y, size, self._flip()))
        return self._finish(tuple(parts), (self.cutouts[left].subject, self.cutouts[right].subject), style, place)

    def _place(self, subjects: Sequence[str], style: str) -> str:
        allowed = places(subjects, style, withheld=False)
        world, plain = load_world(), self.variety.plain
        weights = [
            (1 - plain) / len(world.scenes) if p in world.scenes else plain / len(world.colours) for p in allowed
        ]
        return self.rng.choices(allowed, weights)[0]

    def _flip(self) -> bool:
        return self.rng.random() < self.variety.flip

    def _finish(self, parts: tuple[Placed, ...], subjects: tuple[str, ...], style: str, place: str) -> Plan:
        background, words = self.backgrounds.draw(place)
        said = None if self.rng.random() < self.variety.styleless else style
        return Plan(background, parts, caption(subjects, said, words), subjects, style, place)


def render(plans: Sequence[Plan], resolution: int = RESOLUTION) -> Tensor:
    """Compose on the canvas, then average down: (len(plans), 3, resolution, resolution) float32 in [-1, 1]."""
    images = torch.stack([plan.background for plan in plans]).float().div_(255)
    for layer in range(max(len(plan.parts) for plan in plans)):
        rows = [row for row, plan in enumerate(plans) if len(plan.parts) > layer]
        warped = _warp([plans[row].parts[layer] for row in rows])
        images[rows] = warped[:, :3] + images[rows] * (1 - warped[:, 3:])
    return F.avg_pool2d(images, CANVAS // resolution) * 2 - 1


def _warp(parts: Sequence[Placed]) -> Tensor:
    """Place each cut-out on its own empty canvas: (len(parts), 4, CANVAS, CANVAS) float32, premultiplied, in [0, 1]."""
    pixels = torch.stack([part.pixels for part in parts]).float().div_(255)
    geometry = torch.tensor([(part.x, part.y, part.size, 1 - 2 * part.flipped) for part in parts])
    x, y, size, sign = geometry.unbind(1)
    zoom = SIDE / size  # output coordinates in [-1, 1] -> cut-out coordinates in [-1, 1]
    theta = torch.zeros(len(parts), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = zoom * sign, -(x - CENTRE) / CENTRE * zoom * sign
    theta[:, 1, 1], theta[:, 1, 2] = zoom, -(y - CENTRE) / CENTRE * zoom
    grid = F.affine_grid(theta, [len(parts), 4, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def image_grid(images: Tensor, columns: int, scale: int = 2) -> np.ndarray:
    """Tile (n, 3, h, w) images in [-1, 1] into one (H, W, 3) uint8 sheet, each pixel repeated `scale` times."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = F.pad(pixels, (0, 2, 0, 2), value=200)
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_full((missing, *pixels.shape[1:]), 200)])
    count, channels, height, width = pixels.shape
    sheet = pixels.view(count // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(count // columns * height, columns * width, channels)
    return sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
