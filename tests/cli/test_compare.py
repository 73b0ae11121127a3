"""The compare command as people run it, on a tiny base model: real cells, made once, and those that fail told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sbora_diffusion.evaluation.comparison.cells import run_cell
from sbora_diffusion.evaluation.comparison.plan import Comparison, path_of

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


def compare(world: dict[str, Any], out: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    chosen = [f"{key}={value}" for key, value in QUICK.items()]
    chosen += [f"suite={world['suite']}", f"encoder={world['judge']}", *settings]
    command = [sys.executable, "-m", "sbora_diffusion", "compare"]
    command += [
        "--methods",
        "sbora-fa",
        "--concepts",
        "dog pumpkin",
        "--merge",
        "2",
        "--seeds",
        "0",
        "--base",
        world["base"],
        "--out",
        str(out),
    ]
    command += [word for setting in chosen for word in ("--set", setting)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_makes_every_cell_once(world: dict[str, Any], tmp_path: Path) -> None:
    first = compare(world, tmp_path / "out")
    assert first.returncode == 0, first.stderr
    assert "| sbora-fa | 2 | 2 |" in first.stdout
    cells = sorted((tmp_path / "out").glob("**/sbora-fa/0/*.json"))
    assert [path.stem for path in cells] == ["dog+pumpkin", "dog", "pumpkin"]
    made = {path: path.stat().st_mtime_ns for path in cells}
    again = compare(world, tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in cells} == made
    assert again.stdout == first.stdout
    other = compare(world, tmp_path / "out", "steps=2")
    assert other.returncode == 1
    assert "holds a comparison with settings" in other.stderr


def test_a_cell_that_fails_is_named(world: dict[str, Any], tmp_path: Path) -> None:
    failed = compare(world, tmp_path / "out", "rank=64")  # wider than the base model
    assert failed.returncode == 1
    assert "2 cells failed: sbora-fa/0/dog, sbora-fa/0/pumpkin" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "out/logs/trained/sbora-fa/0/dog.log").stat().st_size > 0


@pytest.mark.parametrize(
    "variant", ["lora", "dora", "orthogonal", "custom-diffusion", "textual-inversion", "blocklora"]
)
def test_cells_of_every_method(world: dict[str, Any], tmp_path: Path, variant: str) -> None:
    settings = QUICK | ({"rank": "4"} if variant == "orthogonal" else {})
    comparison = Comparison(
        variants=(variant,), concepts=("dog", "pumpkin"), seeds=(0,), sizes=(1, 2), settings=settings, **world
    )
    comparison.save(tmp_path)
    for key in comparison.trainings():
        run_cell(tmp_path, "trained", key)
        told = json.loads(path_of(tmp_path, "trained", key).read_bytes())
        assert told["parameters"] > 0 < told["bytes"]
    for key in comparison.merges():
        run_cell(tmp_path, "scores", key)
        told = json.loads(path_of(tmp_path, "scores", key).read_bytes())
        assert sorted(told) == sorted(key.split("/")[-1].split("+"))
        for scores in told.values():
            assert {len(values) for values in scores.values()} == {2}
