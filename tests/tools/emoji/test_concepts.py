"""The shipped concept folders are whole, varied and licensed, and are made anew byte for byte."""

import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sbora_diffusion.data.concept import load_concept
from sbora_diffusion.data.images import load_image
from tools.emoji.art import Sources, default_data_dir
from tools.emoji.concepts import SIDE, compose, distinct_frames, folder_name, write
from tools.emoji.world import Subject, load_world

SHIPPED = Path(__file__).parents[3] / "concepts"
SUBJECTS = {folder_name(subject): subject for subject in load_world().subjects if subject.is_concept}


def turning(poses: int, repeats: int) -> list[Image.Image]:
    """An animation of a hand of a clock: each pose is held for some frames."""
    frames = []
    for pose in range(poses):
        frame = Image.new("RGBA", (SIDE, SIDE))
        ImageDraw.Draw(frame).ellipse((40, 40, 216, 216), fill="teal")
        ImageDraw.Draw(frame).pieslice((40, 40, 216, 216), 360 / poses * pose, 360 / poses * (pose + 1), fill="orange")
        frames += [frame] * repeats
    return frames


@pytest.mark.parametrize("name", SUBJECTS)
def test_shipped_concept(name: str) -> None:
    concept = load_concept(name, [SHIPPED])
    assert (concept.name, concept.token, concept.class_noun) == (name, f"<{name}>", SUBJECTS[name].name)
    captions = [image.caption for image in concept.images]
    assert len(captions) == 5
    assert all(caption.count(concept.token) == 1 for caption in captions)
    assert len({caption.partition(concept.token)[2] for caption in captions}) == 5  # each in another place
    assert sum("3d" in caption for caption in captions) == 2
    for image in concept.images:
        assert load_image(image.path).size == (SIDE, SIDE)
        assert image.path.stat().st_size < 60_000
    source = tomllib.loads((SHIPPED / name / "concept.toml").read_text())["source"]
    assert len(set(source["frames"])) == 5
    assert source["licence"] == "MIT"
    licence = (SHIPPED / name / "LICENSE").read_text()
    assert "Copyright (c) Microsoft Corporation" in licence
    assert f"{source['package']}@{source['version']}" in licence


def test_every_concept_of_the_world_is_shipped_and_no_other() -> None:
    assert {folder.name for folder in SHIPPED.iterdir()} == set(SUBJECTS)


def test_distinct_frames_takes_each_pose_once() -> None:
    frames = turning(poses=5, repeats=4)
    assert [number // 4 for number in distinct_frames(frames, 5)] == [0, 1, 2, 3, 4]


def test_composing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    subject = Subject("a clock", "clock", 0, True)
    for folder in ("one", "two"):
        write(tmp_path / folder / "clock", subject, "1f550", compose("clock", turning(6, 2)))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert load_concept("clock", [tmp_path / "one"]).class_noun == "clock"


def test_another_name_gives_other_images() -> None:
    frames = turning(5, 1)
    pairs = zip(compose("clock", frames), compose("watch", frames), strict=True)
    assert all(np.any(np.asarray(one.image) != np.asarray(other.image)) for one, other in pairs)


def test_subjects_stay_inside_the_image() -> None:
    """A white disc on whatever ground: its top, bottom and sides are all there, at five sizes."""
    disc = Image.new("RGBA", (SIDE, SIDE))
    ImageDraw.Draw(disc).ellipse((8, 8, 248, 248), fill=(255, 0, 255))
    heights = []
    for scene in compose("ball", [disc] * 5):
        rows, columns = np.nonzero((np.asarray(scene.image) == (255, 0, 255)).all(-1))
        assert min(rows.min(), columns.min()) > 0
        assert max(rows.max(), columns.max()) < SIDE - 1
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 3
        heights.append(np.ptp(rows))
    assert np.diff(sorted(heights)).min() > 10


@pytest.mark.skipif(
    not (default_data_dir() / "npm" / "fluent-anim").is_dir(), reason="the Fluent animations are not in the art cache"
)
def test_shipped_dog_is_what_the_command_makes(tmp_path: Path) -> None:
    sources = Sources(default_data_dir())
    write(tmp_path / "dog", SUBJECTS["dog"], sources.code("dog"), compose("dog", sources.animation("dog")))
    for file in ("concept.toml", "LICENSE"):
        assert (tmp_path / "dog" / file).read_text() == (SHIPPED / "dog" / file).read_text()
    for made in (tmp_path / "dog" / "images").iterdir():  # pixels: another zlib may pack them otherwise
        shipped = Image.open(SHIPPED / "dog" / "images" / made.name)
        assert np.array_equal(np.asarray(Image.open(made)), np.asarray(shipped))
