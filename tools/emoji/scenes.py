"""Painted backgrounds: six scenes, each drawn anew with small random differences."""

import math
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # the side of a scene in the units that painters think in, and by default in pixels
Colour = tuple[int, int, int]


class _Canvas:
    """A square image of SIZE x SIZE units with a horizon and the random source of its details."""

    def __init__(self, rng: Random, pixels: int) -> None:
        self.rng = rng
        self.image = Image.new("RGB", (pixels, pixels))
        self.horizon = int(SIZE * rng.uniform(0.56, 0.68))
        self._draw = ImageDraw.Draw(self.image)
        self._unit = pixels / SIZE

    def vary(self, colour: Colour, by: float = 8) -> Colour:
        red, green, blue = (int(min(255, max(0, value + self.rng.uniform(-by, by)))) for value in colour)
        return red, green, blue

    def gradient(self, top: Colour, bottom: Colour, start: int, stop: int) -> None:
        first, last = np.array(self.vary(top), float), np.array(self.vary(bottom), float)
        above, below = round(start * self._unit), round(stop * self._unit)
        for y in range(above, below):
            colour = first + (last - first) * (y - above) / max(1, below - above - 1)
            self._draw.line([(0, y), (self.image.width, y)], fill=tuple(int(value) for value in colour))

    def dot(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self._draw.ellipse(self._pixels(x - radius, y - radius, x + radius, y + radius), fill=colour)

    def line(self, x: float, y: float, to_x: float, to_y: float, width: float, colour: Colour) -> None:
        self._draw.line(self._pixels(x, y, to_x, to_y), fill=colour, width=round(width * self._unit))

    def wave(self, x: float, y: float, colour: Colour) -> None:
        self._draw.arc(self._pixels(x - 8, y - 4, x + 8, y + 4), 180, 360, fill=colour, width=round(2 * self._unit))

    def fill(self, top: float, colour: Colour) -> None:
        self._draw.rectangle(self._pixels(0, top, SIZE, SIZE), fill=colour)

    def dune(self, height: float, wavelength: float, phase: float, offset: int, colour: Colour) -> None:
        line = []
        for x in range(0, SIZE + 4, 4):
            line += [x, self.horizon + offset + height * math.sin(x / SIZE * wavelength + phase)]
        self._draw.polygon(self._pixels(*line, SIZE, SIZE, 0, SIZE), fill=self.vary(colour))

    def _pixels(self, *units: float) -> list[float]:
        return [value * self._unit for value in units]


def _grass(canvas: _Canvas) -> None:
    canvas.gradient((120, 195, 255), (185, 225, 255), 0, canvas.horizon)
    canvas.gradient((122, 200, 85), (80, 165, 60), canvas.horizon, SIZE)
    for _ in range(14):
        x, y = canvas.rng.randrange(SIZE), canvas.rng.randrange(canvas.horizon + 4, SIZE)
        canvas.line(x, y, x + canvas.rng.randint(-3, 3), y - 6, 2, (60, 140, 50))


def _beach(canvas: _Canvas) -> None:
    shore = canvas.horizon
    water = shore - int(SIZE * canvas.rng.uniform(0.10, 0.18))
    canvas.gradient((130, 205, 255), (200, 232, 255), 0, water)
    canvas.gradient((45, 160, 205), (90, 200, 220), water, shore)
    canvas.gradient((250, 224, 165), (232, 198, 130), shore, SIZE)
    canvas.line(0, shore, SIZE, shore, 3, (245, 250, 250))


def _snow(canvas: _Canvas) -> None:
    canvas.gradient((175, 195, 215), (215, 226, 238), 0, canvas.horizon)
    canvas.gradient((250, 252, 255), (228, 236, 246), canvas.horizon, SIZE)
    for _ in range(22):
        x, y = canvas.rng.randrange(SIZE), canvas.rng.randrange(SIZE)
        canvas.dot(x, y, canvas.rng.choice([1, 2, 2, 3]), (255, 255, 255))


def _night(canvas: _Canvas) -> None:
    canvas.gradient((14, 18, 52), (40, 44, 98), 0, canvas.horizon)
    canvas.gradient((30, 46, 52), (18, 30, 36), canvas.horizon, SIZE)
    for _ in range(16):
        x, y = canvas.rng.randrange(SIZE), canvas.rng.randrange(canvas.horizon - 6)
        canvas.dot(x, y, canvas.rng.choice([1, 1, 2]), (250, 245, 200))
    moon = canvas.rng.choice([18, SIZE - 18]) + canvas.rng.randint(-4, 4)
    canvas.dot(moon, canvas.rng.randint(14, 22), 9, (250, 240, 190))


def _desert(canvas: _Canvas) -> None:
    canvas.gradient((255, 205, 135), (255, 228, 175), 0, canvas.horizon)
    canvas.fill(canvas.horizon, (222, 160, 85))
    phase, height = canvas.rng.uniform(0, 2 * math.pi), canvas.rng.uniform(3, 7)
    canvas.dune(height, 5, phase, 0, (222, 160, 85))
    canvas.dune(height, 6, phase + 2, 18, (205, 138, 68))


def _sea(canvas: _Canvas) -> None:
    canvas.gradient((160, 215, 255), (215, 238, 255), 0, canvas.horizon)
    canvas.gradient((45, 140, 205), (22, 90, 165), canvas.horizon, SIZE)
    for _ in range(9):
        x, y = canvas.rng.randrange(SIZE), canvas.rng.randrange(canvas.horizon + 4, SIZE - 2)
        canvas.wave(x, y, (150, 205, 240))


PAINTERS: dict[str, Callable[[_Canvas], None]] = {
    "grass": _grass,
    "beach": _beach,
    "snow": _snow,
    "night": _night,
    "desert": _desert,
    "sea": _sea,
}


def paint(scene: str, rng: Random, size: int = SIZE) -> np.ndarray:
    """One variant of a scene: (size, size, 3) uint8 sRGB; the same `rng` paints the same scene at every size."""
    canvas = _Canvas(rng, size)
    PAINTERS[scene](canvas)
    return np.array(canvas.image)
