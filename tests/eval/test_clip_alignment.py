"""The script that scores any folder of images."""

import json
import sys
from pathlib import Path

import clip_alignment
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from ..tiny_clip import save_tiny_clip

WORDS = "--prompts prompts.txt --references dog --references cat --class-noun dog --out scores.json"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Two images, and references of a dog and of a cat."""
    for number, name in enumerate(("images/000-0.png", "images/001-0.png", "dog/a.jpg", "cat/images/a.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), (60 * number, 255 - 60 * number, 90)).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("A <TOK>, in the snow\nAn angry <TOK>\n")
    return tmp_path


def run(here: Path, clip: Path, images: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    words = [images, "--encoder", str(clip), *WORDS.split()]
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["eval/clip_alignment.py", *words])
    return CliRunner().invoke(clip_alignment.app, words)


def test_a_folder_of_images(here: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(here, clip, "images", monkeypatch)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"# images against dog, judged by {clip}\n")
    assert done.stdout.endswith("\nscores.json\n")
    content = json.loads((here / "scores.json").read_text())
    assert content["about"]["command"].endswith(WORDS)
    assert content["results"][0]["estimates"].keys() >= {"text_mos", "image", "success"}


def test_no_such_folder(here: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(here, clip, "nosuch", monkeypatch)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "error: no folder nosuch\n")
