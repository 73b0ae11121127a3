"""Processes that this package starts import nothing from their working folder."""

import ast
import subprocess
from pathlib import Path

import pytest

from sbora_diffusion.evaluation.comparison import run as comparison
from sbora_diffusion.studio.jobs import WORKER
from sbora_diffusion.training.fan_out import COMMAND
from sbora_diffusion.utils import processes
from sbora_diffusion.utils.processes import isolated

SHADOWS = ("tomllib", "json", "typing_extensions", "random", "sbora_diffusion", "sitecustomize")
PACKAGE = Path(processes.__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of modules that leave a file when they are imported."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})")
    return tmp_path


def test_code_and_modules_start_without_the_working_folder(folder: Path) -> None:
    code = "import json, random, sys, tomllib; assert not {'', '.'} & {*sys.path}"
    for words in (("-c", code), ("-m", "json.tool", "--help"), ("-m", "tomllib", "x"), ("-m", "sitecustomize")):
        subprocess.run(isolated(*words), cwd=folder, capture_output=True, check=False)
    assert not (folder / "imported").exists()
    done = subprocess.run(isolated("-c", code), cwd=folder, check=False)
    assert done.returncode == 0


def test_every_process_of_the_package_is_isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert WORKER[:2] == COMMAND[:2] == isolated()
    started: list[tuple[str, ...]] = []

    def start(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[bytes]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)
    assert comparison._in_process(tmp_path, "train", "x")
    assert started[0][:2] == isolated()


def test_only_one_place_names_the_interpreter() -> None:
    users = []
    for path in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        users += [path.name for node in nodes if isinstance(node, ast.Attribute) and node.attr == "executable"]
    assert users == ["processes.py"]
