"""Every way of stopping a training loses nothing: it goes on, bit for bit."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.library.library import Library

from .running import CLI, QUICK, train

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from sbora_diffusion.cli.app import main

replace, link, (when, name), sys.argv = Path.replace, os.link, sys.argv[1:3], sys.argv[:1] + sys.argv[3:]

def die_at(target):
    if Path(target).name == name and Path(target).exists() == (when == "again"):
        os.kill(os.getpid(), signal.SIGKILL)

def replace_or_die(self, target):
    die_at(target)
    return replace(self, target)

def link_or_die(source, target, **options):
    die_at(target)
    return link(source, target, **options)

Path.replace, os.link = replace_or_die, link_or_die
main()
"""


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT in the middle of a step."""
    from sbora_diffusion.training import run as module

    steps = iter(range(1, step + 1))

    def memory_bytes(_: object) -> int:
        if next(steps) == step:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(module, "memory_bytes", memory_bytes)


@pytest.mark.parametrize(
    ("step", "message"),
    [(1, "stopped before the first checkpoint"), (5, "the last checkpoint is kept in runs/dog, resume with:")],
)
def test_ctrl_c_and_resume(here: Path, base: Path, trained: tuple[Path, list[Result]], step: int, message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(step, patch)
        stopped = train(base, "dog")
    assert stopped.exit_code == 130
    assert message in stopped.stderr
    assert Library("adapters").ledgers() == []
    if step > 1:
        refused = train(base, "dog")
        assert (refused.exit_code, "--resume" in refused.stderr) == (1, True)
    assert train(base, "dog", "--resume").exit_code == 0
    uninterrupted = trained[0] / "adapters/dog.safetensors"
    assert (here / "adapters/dog.safetensors").read_bytes() == uninterrupted.read_bytes()


def test_resume_keeps_the_columns(here: Path, base: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        train(base, "dog", "--interval", "16:24")
    assert train(base, "dog", "--resume").exit_code == 0
    assert str(Adapter.load(here / "adapters/dog.safetensors").spec.intervals[0]) == "16:24"


def test_force_begins_anew(adapters: Path, base: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        train(base, "dog", "--force")
    anew = train(base, "dog", "--force", "--set", "seed=1")
    assert anew.exit_code == 0, anew.output
    assert Adapter.load(adapters / "dog.safetensors").spec.recipe["seed"] == 1


@pytest.mark.parametrize("killed_at", ["first checkpoint.pt", "again checkpoint.pt", "first dog.safetensors"])
def test_kill_and_resume(here: Path, base: Path, trained: tuple[Path, list[Result]], killed_at: str) -> None:
    words = ["train", "--concept", "dog", "--base", str(base), *QUICK]
    killed = subprocess.run([sys.executable, "-c", KILLED_AT, *killed_at.split(), *words], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert Library("adapters").names() == []
    assert train(base, "dog", "--resume").exit_code == 0
    uninterrupted = trained[0] / "adapters/dog.safetensors"
    assert (here / "adapters/dog.safetensors").read_bytes() == uninterrupted.read_bytes()


def test_ctrl_c_at_the_console(here: Path, base: Path) -> None:
    words = ["train", "--concept", "dog", "--base", str(base), *QUICK, "--set", "steps=1000000"]
    with subprocess.Popen([*CLI, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: (here / "runs/dog/checkpoint.pt").exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].endswith("--resume")


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)
