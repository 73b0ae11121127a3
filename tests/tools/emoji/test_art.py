"""Art from npm packages: looked up, rendered, cut out, stored; on tiny packages written here, offline."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbora_diffusion.utils.errors import SboraError
from tools.emoji.art import (
    PACKAGES,
    SIZE,
    SVG_SETS,
    WIDE_ART,
    Sources,
    build,
    build_wide,
    cut_out,
    load_art,
)
from tools.emoji.world import load_world

SVG = '<rect x="8" y="12" width="16" height="8" fill="#ff0000"/>'
BEYOND = (("zebra", 3, 34), ("dog face", 3, 34), ("ringed planet", 5, 59), ("thumbs up", 1, 19), ("ice cream", 4, 46))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with all npm packages, holding every subject in every style but a flat unicorn."""
    labels = {subject.label: f"{number + 0x1F400:x}" for number, subject in enumerate(load_world().subjects)}
    packages = {name: tmp_path / "npm" / name / "package" for name in PACKAGES}
    for name in ("fluent-3d", "fluent-anim"):
        (packages[name] / "assets").mkdir(parents=True)
    (packages["names"] / "en").mkdir(parents=True)
    entries: list[dict[str, str | int]] = [{"label": label, "hexcode": code.upper()} for label, code in labels.items()]
    for number, (label, group, subgroup) in enumerate(BEYOND):
        labels[label] = f"{number + 0x1FA00:x}"
        entries.append({"label": label, "hexcode": labels[label].upper(), "group": group, "subgroup": subgroup})
    (packages["names"] / "en" / "data.json").write_text(json.dumps(entries))
    for style, name in SVG_SETS.items():
        icons = {code: {"body": SVG} for label, code in labels.items() if (label, style) != ("unicorn", "flat")}
        packages[name].mkdir(parents=True)
        (packages[name] / "icons.json").write_text(json.dumps({"width": 32, "height": 32, "icons": icons}))
        (packages[name] / "chars.json").write_text(json.dumps({code: code for code in icons}))
    for code in labels.values():
        Image.new("RGBA", (8, 8), "blue").save(packages["fluent-3d"] / "assets" / f"{code}.webp", lossless=True)
    frames = [Image.new("RGBA", (8, 8), colour) for colour in ("red", "lime", "blue")]
    moving = packages["fluent-anim"] / "assets" / f"{labels['dog']}-fe0f.webp"
    frames[0].save(moving, save_all=True, append_images=frames[1:], lossless=True)
    return tmp_path


def test_build_stores_all_there_is(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    built, loaded = build(data), load_art(data)
    assert np.array_equal(built.images, loaded.images)
    assert built.cutouts == loaded.cutouts
    assert len(loaded.cutouts) == len(load_world().subjects) * 4 - 1
    assert [record.message for record in caplog.records] == ["no flat art of unicorn"]
    held = {(cutout.subject, cutout.style) for cutout in loaded.cutouts if cutout.held_out}
    assert len(held) == 32
    assert {("dog", "3d"), ("dog", "flat")} <= held


def test_the_judges_art_is_wider(data: Path) -> None:
    build_wide(data)
    wide = load_art(data, WIDE_ART)
    beyond = {c.subject: c.held_out for c in wide.cutouts}
    world = {subject.name for subject in load_world().subjects}
    assert set(beyond) - world == {"zebra", "dog face"}  # no sky, no hands, and no second "ice cream"
    assert (beyond["zebra"], beyond["dog face"]) == (True, False)
    assert sum(c.subject == "ice cream" for c in wide.cutouts) == 4
    assert {c.style for c in wide.cutouts if c.subject == "dog" and c.held_out} == {"3d", "flat"}


def test_svg_art_is_drawn_and_cut_out(data: Path) -> None:
    image = Sources(data).image("owl", "drawing")
    assert image is not None
    pixels, width, height = cut_out(image)
    assert (width, height) == (252 / 256, 126 / 256)
    assert tuple(pixels[128, 128]) == (255, 0, 0, 255)
    assert not pixels[:60].any()
    assert Sources(data).image("unicorn", "flat") is None


def test_animation_frames_are_found_by_a_variant_of_the_code(data: Path) -> None:
    frames = Sources(data).animation("dog")
    assert [frame.getpixel((0, 0)) for frame in frames] == [(255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)]
    assert Sources(data).code("dog") == "1f400"
    with pytest.raises(SboraError, match=r"no animation of 'owl' in @lobehub/fluent-emoji-anim-1@1\.0\.0"):
        Sources(data).animation("owl")
    with pytest.raises(SboraError, match="unknown emoji label 'doggo'"):
        Sources(data).code("doggo")


def test_cut_out_crops_centres_and_premultiplies() -> None:
    image = Image.new("RGBA", (50, 50), (9, 9, 9, 8))  # almost invisible: cropped away
    image.paste((200, 100, 0, 128), (5, 10, 15, 30))
    pixels, width, height = cut_out(image, 64)
    assert (width, height) == (30 / 64, 60 / 64)
    assert pixels.shape == (64, 64, 4)
    np.testing.assert_allclose(pixels[32, 32], (100, 50, 0, 128), atol=1)
    assert not pixels[:, :17].any()
    assert not pixels[:, 47:].any()


def test_nothing_to_cut_out() -> None:
    with pytest.raises(SboraError, match="empty"):
        cut_out(Image.new("RGBA", (SIZE, SIZE)))


def test_missing_art(tmp_path: Path) -> None:
    with pytest.raises(SboraError, match=r"no art\.npz in") as caught:
        load_art(tmp_path)
    assert caught.value.hint == "run: python -m tools.emoji.art"
