"""Images of every kind that cameras and programs write become the same upright RGB; damaged ones become one error."""

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from sbora_diffusion.data.images import load_image, to_tensor
from sbora_diffusion.utils.errors import SboraError

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "dreambooth"
RED, GREEN, BLUE, YELLOW = (230, 30, 30), (30, 180, 40), (40, 60, 220), (240, 220, 40)


def quarters(size: tuple[int, int] = (80, 64)) -> Image.Image:
    """Red and green above, blue and yellow below."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, GREEN, BLUE, YELLOW])
    return image.resize(size, Image.Resampling.NEAREST)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours near the four corners, row by row."""
    width, height = image.size
    pixels = np.asarray(image)
    return [tuple(int(v) for v in pixels[y, x]) for y in (5, height - 6) for x in (5, width - 6)]


def assert_near(got: list[tuple[int, ...]], want: list[tuple[int, int, int]], tolerance: int = 12) -> None:
    assert np.abs(np.subtract(got, want)).max() <= tolerance, (got, want)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "no-extension"])
def test_reads_formats(tmp_path: Path, name: str) -> None:
    kind = {"a.jpg": "JPEG", "a.webp": "WEBP"}.get(name, "PNG")
    quarters().save(tmp_path / name, kind)
    image = load_image(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (80, 64))
    assert_near(corners(image), [RED, GREEN, BLUE, YELLOW])


@pytest.mark.parametrize(
    ("orientation", "want"),
    [
        (1, [RED, GREEN, BLUE, YELLOW]),
        (2, [GREEN, RED, YELLOW, BLUE]),
        (3, [YELLOW, BLUE, GREEN, RED]),
        (4, [BLUE, YELLOW, RED, GREEN]),
        (5, [RED, BLUE, GREEN, YELLOW]),
        (6, [BLUE, RED, YELLOW, GREEN]),
        (7, [YELLOW, GREEN, BLUE, RED]),
        (8, [GREEN, YELLOW, RED, BLUE]),
    ],
)
def test_turns_by_exif(tmp_path: Path, orientation: int, want: list[tuple[int, int, int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters().save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == ((64, 80) if orientation > 4 else (80, 64))
    assert_near(corners(image), want)


def test_fills_transparency_with_the_background(tmp_path: Path) -> None:
    image = quarters().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 40, 32))
    image.paste((200, 0, 0, 128), (40, 0, 80, 32))
    image.save(tmp_path / "a.png")
    assert_near(corners(load_image(tmp_path / "a.png")), [(255, 255, 255), (227, 127, 127), BLUE, YELLOW], 1)
    on_black = load_image(tmp_path / "a.png", (0, 0, 0))
    assert_near(corners(on_black), [(0, 0, 0), (100, 0, 0), BLUE, YELLOW], 1)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = quarters().quantize(4)
    palette.save(tmp_path / "opaque.png")
    assert_near(corners(load_image(tmp_path / "opaque.png")), [RED, GREEN, BLUE, YELLOW])
    palette.save(tmp_path / "clear.png", transparency=palette.getpixel((5, 5)))
    assert_near(corners(load_image(tmp_path / "clear.png")), [(255, 255, 255), GREEN, BLUE, YELLOW])


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey(tmp_path: Path, mode: str) -> None:
    halves = Image.new("L", (64, 64))
    halves.paste(255, (32, 0, 64, 64))
    halves.convert(mode).save(tmp_path / "a.png")
    assert corners(load_image(tmp_path / "a.png")) == [(0, 0, 0), (255, 255, 255)] * 2


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "a.png")
    pixels = np.asarray(load_image(tmp_path / "a.png"))[0, :, 0]
    np.testing.assert_allclose(pixels, ramp / 257, atol=0.5)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert_near(corners(load_image(tmp_path / "a.jpg")), [(255, 0, 0)] * 4)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert_near(corners(load_image(tmp_path / "a.webp")), [RED] * 4)


@pytest.mark.parametrize("size", [(32, 32), (33, 1001), (1000, 37)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    quarters(size).save(tmp_path / "a.png")
    assert to_tensor(load_image(tmp_path / "a.png"), (64, 64)).shape == (3, 64, 64)


def test_too_small(tmp_path: Path) -> None:
    quarters((200, 31)).save(tmp_path / "dot.png")
    with pytest.raises(SboraError, match=r"dot\.png is too small: 200 x 31 pixels, at least 32 x 32"):
        load_image(tmp_path / "dot.png")


@pytest.mark.parametrize("side", [10_000, 50_000])
def test_decompression_bomb(tmp_path: Path, side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path = tmp_path / "bomb.png"
    path.write_bytes(content + struct.pack(">I", 0) + b"IDAT")
    with pytest.raises(SboraError, match=r"bomb\.png is too large: at most 89 megapixels"):
        load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "half", kind)
    whole = (tmp_path / "half").read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SboraError, match=r"cannot read .*half: "):
        load_image(tmp_path / "half")


@pytest.mark.parametrize("content", [b"", b"these are\ntwo lines\n", b"GIF89a" + bytes(50)])
def test_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(SboraError, match=r"cannot read .*a\.jpg: neither JPEG, PNG nor WebP"):
        load_image(tmp_path / "a.jpg")


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match=r"no such image: .*gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(SboraError, match="Is a directory"):
        load_image(tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=8),
)
def test_damaged_bytes_give_a_image_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, flips: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a"
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    quarters().save(path, kind, exif=exif, icc_profile=profile)
    content = bytearray(path.read_bytes())
    for where, flip in flips:
        content[int(where * (len(content) - 1))] ^= flip
    path.write_bytes(content)
    with contextlib.suppress(SboraError):
        assert load_image(path).mode == "RGB"


def test_to_tensor_cuts_the_middle_and_spans_minus_one_to_one() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste((255, 255, 255), (100, 0, 200, 50))
    image.paste((0, 0, 0), (100, 50, 200, 100))
    pixels = to_tensor(image, (10, 10))
    assert (pixels.dtype, pixels.shape) == (torch.float32, (3, 10, 10))
    inner = pixels[:, :, 1:-1]  # the filter reaches a little beyond the cut, and rings a little
    torch.testing.assert_close(inner[:, :4], torch.ones(3, 4, 8), atol=0.03, rtol=0)
    torch.testing.assert_close(inner[:, 6:], -torch.ones(3, 4, 8), atol=0.03, rtol=0)


def test_to_tensor_keeps_the_pixels_of_a_image_of_the_right_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    back = (to_tensor(Image.fromarray(pixels), (64, 64)) + 1) * 127.5
    np.testing.assert_allclose(back.permute(1, 2, 0).numpy(), pixels, atol=1e-4)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"the DreamBooth photographs are not in {PHOTOGRAPHS}")
def test_real_photographs() -> None:
    photographs = sorted(PHOTOGRAPHS.glob("*/*.jpg"))
    assert photographs
    for path in photographs[::5]:
        pixels = to_tensor(load_image(path), (64, 64))
        assert pixels.shape == (3, 64, 64)
        assert pixels.std() > 0.05, path
