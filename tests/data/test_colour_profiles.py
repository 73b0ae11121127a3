"""Images whose numbers are not sRGB: the embedded ICC profile counts, and a broken one does no harm."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbora_diffusion.data.images import load_image

D50 = (0.9642, 1.0, 0.8249)
SRGB_COLOURS = [(0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]  # XYZ at D50
P3_COLOURS = [(0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1572, 0.0666, 0.7841)]
P3_TO_SRGB = [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]  # of linear light, at D65
COLOUR = (180, 90, 40)


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2.4, byte by byte (ICC.1:2001-04)."""
    tags = {b"desc": text("a test"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(*D50), **tags}
    table, data, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">4xI4s4s4s12x4s28x", 0x02400000, kind, space, connection, b"acsp") + xyz(*D50)[8:]
    content = head.ljust(124, b"\0") + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", 4 + len(content)) + content


def text(words: str) -> bytes:
    return struct.pack(">4s4xI", b"desc", len(words) + 1) + words.encode() + bytes(1 + 11 + 67)


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(exponent: float) -> bytes:
    return struct.pack(">4s4xIH", b"curv", 1, round(exponent * 256))


def srgb_curve() -> bytes:
    points = [round(65535 * float(linear(x / 1023))) for x in range(1024)]
    return struct.pack(">4s4xI1024H", b"curv", 1024, *points)


def rgb_profile(colours: list[tuple[float, float, float]]) -> bytes:
    letters = (b"r", b"g", b"b")
    primaries = {letter + b"XYZ": xyz(*colour) for letter, colour in zip(letters, colours, strict=True)}
    return profile(b"RGB ", primaries | {letter + b"TRC": srgb_curve() for letter in letters})


def cmyk_profile() -> bytes:
    """Inks that are not what they are called: the first is red, the last is black, the others leave no trace."""
    white, red, black = (255, 128, 128), (138, 209, 198), (0, 128, 128)  # L* 0…255, a* and b* + 128
    nodes = [black if node % 2 else red if node >= 8 else white for node in range(16)]  # the first varies most slowly
    identity = bytes(range(256))
    head = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2)
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = head + matrix + identity * 4 + bytes(np.array(nodes, np.uint8)) + identity * 3
    return profile(b"CMYK", {b"A2B0": table}, b"prtr", b"Lab ")


def linear(encoded: np.ndarray | float) -> np.ndarray:
    """sRGB's transfer function, IEC 61966-2-1, from 0…1 to 0…1."""
    value = np.asarray(encoded)
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def load(path: Path, image: Image.Image, icc: bytes, kind: str = "PNG", **options: int) -> tuple[int, ...]:
    """The colour in the middle after a trip through a file."""
    image.save(path, kind, icc_profile=icc, **options)
    with Image.open(path) as stored:
        assert stored.info["icc_profile"] == icc
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    pixel = loaded.getpixel((20, 20))
    assert isinstance(pixel, tuple)
    return tuple(int(value) for value in pixel)


def flat(mode: str, colour: int | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (40, 40), colour)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_display_p3(tmp_path: Path, kind: str) -> None:
    want = 255 * encoded(np.array(P3_TO_SRGB) @ linear(np.array(COLOUR) / 255))
    got = load(tmp_path / "a", flat("RGB", COLOUR), rgb_profile(P3_COLOURS), kind, quality=100)
    assert np.abs(want - COLOUR).max() > 10  # so that an ignored profile cannot pass
    np.testing.assert_allclose(got, want, atol=2 if kind == "PNG" else 6)


def test_swapped_primaries(tmp_path: Path) -> None:
    got = load(tmp_path / "a", flat("RGB", COLOUR), rgb_profile(SRGB_COLOURS[::-1]))
    np.testing.assert_allclose(got, COLOUR[::-1], atol=1)


def test_srgb_itself_changes_nothing(tmp_path: Path) -> None:
    np.testing.assert_allclose(load(tmp_path / "a", flat("RGB", COLOUR), rgb_profile(SRGB_COLOURS)), COLOUR, atol=1)


def test_transparency_stays(tmp_path: Path) -> None:
    icc = rgb_profile(SRGB_COLOURS[::-1])
    half = load(tmp_path / "half.png", flat("RGBA", (*COLOUR, 128)), icc)
    np.testing.assert_allclose(half, (np.array(COLOUR[::-1]) * 128 + 255 * 127) / 255, atol=2)
    keyed = flat("RGB", COLOUR)
    keyed.info["transparency"] = COLOUR
    assert load(tmp_path / "keyed.png", keyed, icc) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey(tmp_path: Path, mode: str) -> None:
    icc = profile(b"GRAY", {b"kTRC": gamma(1)})
    got = load(tmp_path / "a", flat(mode, 64 if mode == "L" else (64, 255)), icc)
    np.testing.assert_allclose(got, [255 * encoded(np.array(64 / 255))] * 3, atol=1)  # 137


def test_cmyk(tmp_path: Path) -> None:
    first = load(tmp_path / "a", flat("CMYK", (255, 0, 0, 0)), cmyk_profile(), "JPEG", quality=100)
    np.testing.assert_allclose(first, (255, 0, 0), atol=10)  # cyan without the profile
    second = load(tmp_path / "a", flat("CMYK", (0, 255, 0, 0)), cmyk_profile(), "JPEG", quality=100)
    np.testing.assert_allclose(second, (255, 255, 255), atol=10)


@pytest.mark.parametrize(
    "icc",
    [
        b"no profile",
        rgb_profile(P3_COLOURS)[:300],
        rgb_profile(P3_COLOURS).replace(b"rXYZ", b"????"),
        profile(b"GRAY", {b"kTRC": gamma(1)}),
        cmyk_profile(),
    ],
    ids=["garbage", "truncated", "without red", "grey", "cmyk"],
)
def test_a_profile_that_does_not_work_is_ignored(tmp_path: Path, icc: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert load(tmp_path / "a.png", flat("RGB", COLOUR), icc) == COLOUR
    assert "a.png: its colour profile does not work" in caplog.text
    assert len(caplog.records) == 1


def test_palettes_and_sixteen_bits_are_taken_for_srgb(tmp_path: Path) -> None:
    icc = rgb_profile(SRGB_COLOURS[::-1])
    assert load(tmp_path / "palette.png", flat("RGB", COLOUR).quantize(2), icc) == COLOUR
    grey = profile(b"GRAY", {b"kTRC": gamma(1)})
    assert load(tmp_path / "deep.png", flat("I;16", 64 * 257), grey) == (64, 64, 64)
