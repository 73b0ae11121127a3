"""A tiny base model, concepts trained on it, and a folder to work in."""

import shutil
from pathlib import Path

import pytest
from typer.testing import Result

from ..tiny_pipeline import save_tiny_pipeline
from .running import train


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """A folder in which dog and cat were trained, and what the two commands answered."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, [train(base, "dog"), train(base, "cat")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path()


@pytest.fixture
def adapters(here: Path, trained: tuple[Path, list[Result]]) -> Path:
    """The same with the concepts dog and cat in it."""
    return Path(shutil.copytree(trained[0] / "adapters", here / "adapters"))
