"""The compare command on a tiny base model: real cells, computed once, and errors for those that fail."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sbora_diffusion.cli.app import app
from sbora_diffusion.evaluation.comparison import cells
from sbora_diffusion.evaluation.comparison import run as comparison_run
from sbora_diffusion.evaluation.comparison.plan import Comparison, path_of
from sbora_diffusion.inference.generate import generate
from sbora_diffusion.utils.errors import SboraError

from ..tiny_clip import save_tiny_clip
from ..tiny_pipeline import save_tiny_pipeline

QUICK = {"steps": "1", "crops": "1", "sampling_steps": "1", "save_every": "1", "warmup_steps": "1", "batch_size": "2"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base model, a judge and a suite of two prompts."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "two.txt").write_text("a <TOK>\na red <TOK>\n")
    base, judge = save_tiny_pipeline(folder / "base"), save_tiny_clip(folder / "clip")
    return {"base": str(base), "judge": str(judge), "suite": str(folder / "two.txt")}


def words(world: dict[str, Any], out: Path, *settings: str) -> list[str]:
    """The words of the command."""
    chosen = [f"{key}={value}" for key, value in QUICK.items()]
    chosen += [f"suite={world['suite']}", f"encoder={world['judge']}", *settings]
    given = {"methods": "sbora-fa", "concepts": "dog pumpkin", "merge": "2", "seeds": "0"}
    given |= {"base": world["base"], "out": str(out)}
    options = [word for key, value in given.items() for word in (f"--{key}", value)]
    return ["compare", *options, *(word for setting in chosen for word in ("--set", setting))]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the training of pumpkin runs in a process of its own, as all cells do."""
    in_process = comparison_run._in_process

    def compute(folder: Path, kind: str, key: str) -> bool:
        if kind == "trained" and key.endswith("pumpkin"):
            return in_process(folder, kind, key)
        try:
            cells.run_cell(folder, kind, key)
        except SboraError:
            return False
        return True

    monkeypatch.setattr(comparison_run, "_in_process", compute)


@pytest.mark.usefixtures("one_process")
def test_the_command_computes_every_cell_once(world: dict[str, Any], tmp_path: Path) -> None:
    first = CliRunner().invoke(app, words(world, tmp_path / "out"))
    assert first.exit_code == 0, first.output
    assert "| sbora-fa | 2 | 2 |" in first.stdout
    cells = sorted((tmp_path / "out").glob("**/sbora-fa/0/*.json"))
    assert [path.stem for path in cells] == ["dog+pumpkin", "dog", "pumpkin"]
    written = {path: path.stat().st_mtime_ns for path in cells}
    again = CliRunner().invoke(app, words(world, tmp_path / "out"))
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in cells} == written
    assert again.stdout == first.stdout
    other = CliRunner().invoke(app, words(world, tmp_path / "out", "steps=2"))
    assert other.exit_code == 1
    assert "holds a comparison with settings" in other.stderr


@pytest.mark.usefixtures("one_process")
def test_a_cell_that_fails_is_named(world: dict[str, Any], tmp_path: Path) -> None:
    failed = CliRunner().invoke(app, words(world, tmp_path / "out", "rank=64"))  # wider than the base model
    assert failed.exit_code == 1
    assert "2 cells failed: sbora-fa/0/dog, sbora-fa/0/pumpkin" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "out/logs/trained/sbora-fa/0/pumpkin.log").stat().st_size > 0


@pytest.mark.parametrize("variant", ["lora", "orthogonal", "textual-inversion"])  # others: tests/methods/test_matrix.py
def test_cells_of_every_method(
    world: dict[str, Any], tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "generate", lambda *args, **kwargs: generate(*args, **kwargs | {"steps": 2}))
    settings = QUICK | ({"rank": "4"} if variant == "orthogonal" else {})
    comparison = Comparison(
        variants=(variant,), concepts=("dog", "pumpkin"), seeds=(0,), sizes=(1, 2), settings=settings, **world
    )
    comparison.save(tmp_path)
    for key in comparison.trainings():
        cells.run_cell(tmp_path, "trained", key)
        told = json.loads(path_of(tmp_path, "trained", key).read_bytes())
        assert told["parameters"] > 0 < told["bytes"]
    for key in comparison.merges():
        cells.run_cell(tmp_path, "scores", key)
        told = json.loads(path_of(tmp_path, "scores", key).read_bytes())
        assert sorted(told) == sorted(key.split("/")[-1].split("+"))
        for scores in told.values():
            assert {len(values) for values in scores.values()} == {2}
