"""Concept folders from uploaded images, and the progress of their trainings."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from PIL import Image

from sbora_diffusion.studio.jobs import Job, Jobs
from sbora_diffusion.studio.session import Folders, Session
from sbora_diffusion.studio.train_tab import resume_training, start_training
from sbora_diffusion.studio.train_view import Progress, read_progress, smoothed, watcher
from sbora_diffusion.studio.uploads import caption_lines, write_concept
from sbora_diffusion.training.checkpoint import append_log
from sbora_diffusion.utils.errors import SboraError


class Queue:
    """A queue whose jobs are stopped at once."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    def add(self, name: str, arguments: Sequence[str]) -> None:
        self._jobs[name] = Job(name=name, arguments=tuple(arguments), state="stopped")

    def check_room(self) -> None:
        pass

    def find(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def all(self, command: str = "") -> list[Job]:  # noqa: ARG002
        return list(self._jobs.values())


@pytest.fixture
def images(tmp_path: Path) -> list[tuple[Path, str]]:
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{number}.PNG")
    return [(tmp_path / "0.PNG", 'a <mug-1> "here" \\ 🫖\n'), (tmp_path / "1.PNG", "  ")]


def test_write_concept(tmp_path: Path, images: list[tuple[Path, str]]) -> None:
    concept = write_concept(tmp_path / "concepts", "mug-1", " mug ", images)
    assert (concept.name, concept.token, concept.class_noun) == ("mug-1", "<mug-1>", "mug")
    assert [image.caption for image in concept.images] == ['a <mug-1> "here" \\ 🫖', "a <mug-1>"]
    assert concept.images[0].path.read_bytes() == (tmp_path / "0.PNG").read_bytes()
    with pytest.raises(SboraError, match="the concept mug-1 already exists"):
        write_concept(tmp_path / "concepts", "mug-1", "mug", images)


@pytest.mark.parametrize(
    ("captions", "files", "before", "expected"),
    [
        ("", "rb", "", "a <cup>|a <cup>"),
        ("a <mug> here\na mug", "rbg", "rb", "a <cup> here|a mug|a <cup>"),
        ("red <mug>\nblue <mug>\ngreen <mug>", "bg", "rbg", "blue <cup>|green <cup>"),
        ("red <mug>\nblue <mug>\ngreen <mug>", "gxr", "rbg", "green <cup>|a <cup>|red <cup>"),
        ("one <mug>\ntwo <mug>", "rr", "rr", "one <cup>|two <cup>"),
        ("written <mug>\nbefore", "rb", "", "written <cup>|before"),
        ("red <mug>", "", "r", ""),
    ],
)
def test_captions_follow_images_and_name(captions: str, files: str, before: str, expected: str) -> None:
    """Letters stand for images."""
    assert "|".join(caption_lines(captions, files, before, "<mug>", "<cup>")) == expected


@pytest.mark.parametrize("name", ["", "Mug", "../mug", "a/b", "mug.", "<mug>", "-mug", "m" * 41, "a b"])
def test_invalid_names(tmp_path: Path, images: list[tuple[Path, str]], name: str) -> None:
    with pytest.raises(SboraError, match="got the name"):
        write_concept(tmp_path / "concepts", name, "mug", images)
    assert not (tmp_path / "concepts").exists()


def test_refused_uploads_leave_nothing_behind(tmp_path: Path, images: list[tuple[Path, str]]) -> None:
    (tmp_path / "text.png").write_text("not an image")
    root = tmp_path / "concepts"
    for noun, given, message in (
        ("", images, "the class noun is missing"),
        ("mug", [], "got 0 images"),
        ("mug", images * 26, "got 52 images"),
        ("mug", [(tmp_path / "text.png", "")], r"text\.png cannot be read"),
        ("mug", [(images[0][0], "a mug")], "lacks the token"),
    ):
        with pytest.raises(SboraError, match=message):
            write_concept(root, "mug", noun, given)
    assert not root.exists() or list(root.iterdir()) == []


def test_a_training_is_named_after_its_concept(tmp_path: Path, images: list[tuple[Path, str]]) -> None:
    """Not after the concept's folder: the run folder has the concept's name, too."""
    write_concept(tmp_path / "concepts", "mug", "mug", [(path, "") for path, _ in images])
    (tmp_path / "concepts/mug").rename(tmp_path / "concepts/My_Photos")
    folders = Folders(adapters=tmp_path, runs=tmp_path / "runs", concepts=tmp_path / "concepts")
    session, queue = Session(folders), Queue()
    given = ("My_Photos", None, "", "", "", "emoji64", "sbora-fa", "default", 0, 0)
    start_training(session, cast(Jobs, queue), *given)
    assert queue.all()[0].arguments[:3] == ("train", "--concept", "My_Photos")
    (tmp_path / "runs/mug").mkdir(parents=True)
    append_log(tmp_path / "runs/mug", {"step": 3, "steps": 9, "loss": 1.0, "time": time.time()})
    assert "stopped at step 3 of 9" in watcher(session, cast(Jobs, queue))("mug", ("", "", -1, ""))[1]
    (tmp_path / "runs/mug/checkpoint.pt").touch()
    resume_training(session, cast(Jobs, queue), "mug")
    assert queue.all()[0].arguments[-1] == "--resume"
    with pytest.raises(SboraError, match="the training of mug was interrupted"):
        start_training(session, cast(Jobs, queue), *given)


def test_progress(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == Progress()
    now = time.time()
    (tmp_path / "preview.png").touch()
    for step in range(1, 41):
        image = {20: "preview.png", 30: "lost.png"}.get(step)
        append_log(
            tmp_path,
            {"step": step, "steps": 100, "loss": 1 / step, "time": now - 2 * (40 - step), "image": image},
        )
    run = read_progress(tmp_path)
    assert (run.step, run.steps, run.image) == (40, 100, tmp_path / "preview.png")
    assert run.losses[1] == (2, 0.5)
    assert run.seconds_left == pytest.approx(120, abs=5)


def test_smoothing_is_unbiased() -> None:
    assert smoothed([(1, 3.0), (2, 3.0)], 0.5) == [(1, 3.0), (2, 3.0)]
    assert smoothed([(1, 1.0), (2, 4.0)], 0.5)[1] == (2, pytest.approx(3.0))
    assert smoothed([]) == []
