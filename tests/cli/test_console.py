"""What every command does before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sbora_diffusion import __version__
from sbora_diffusion.cli.app import Commands
from sbora_diffusion.cli.console import GC_THRESHOLD, SPIN_COUNT, boolean, convert, parse_floats, share_cores

from .running import run


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_cores_are_shared_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    environment = dict(given)
    monkeypatch.setattr("os.environ", environment)
    share_cores()
    assert environment == expected


IN_A_NEW_PROCESS = """
import atexit, gc, sys
frozen = []
atexit.register(lambda: print(frozen[0], gc.get_threshold()[0], gc.isenabled()))
from sbora_diffusion.cli.app import main
freeze = gc.freeze
gc.freeze = lambda: (frozen.append(True), freeze())
sys.argv = ["sbora-diffusion", "ledger"]
main()
"""


def test_garbage_is_collected_less_and_not_at_exit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"True {GC_THRESHOLD} True\n"


@pytest.mark.parametrize(
    ("text", "expected"), [("1", True), ("true", True), ("on", True), ("0", False), ("False", False), ("no", False)]
)
def test_booleans(text: str, expected: bool) -> None:
    assert convert({"gated": text}, {"gated": boolean}) == {"gated": expected}


def test_a_wrong_value_names_what_is_expected() -> None:
    with pytest.raises(typer.BadParameter, match="got gated=2, expected true or false"):
        convert({"gated": "2"}, {"gated": boolean})
    with pytest.raises(typer.BadParameter, match="got steps=many, expected a number"):
        convert({"steps": "many"}, {"steps": int})
    with pytest.raises(typer.BadParameter, match=r"expected numbers such as 1,0\.8"):
        parse_floats("1;2")


def test_factors() -> None:
    assert parse_floats("1,0.8") == [1.0, 0.8]
    assert parse_floats("") is None


HELP = """
import sys
from typer.testing import CliRunner
from sbora_diffusion.cli.app import Commands, app
ours = lambda: {name for name in sys.modules if name.startswith("sbora_diffusion.cli.")}
print(CliRunner().invoke(app, ["--version"]).stdout, CliRunner().invoke(app, ["--help"]).stdout)
assert ours() == {"sbora_diffusion.cli.app", "sbora_diffusion.cli.console"}, ours()
for name in ["llm train", "llm merge", "llm export", "llm chat", "llm eval", *Commands.table]:
    done = CliRunner().invoke(app, [*name.split(), "--help"])
    assert "Usage:" in done.stdout and done.exit_code == 0, (name, done.output)
    assert name != "eval" or done.stdout.count("\\n  --") <= 9  # eight flags and --help
assert not {"torch", "numpy", "rich"} & {*sys.modules}
"""


def test_help_imports_no_library() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout
    for name in Commands.table:
        assert f"\n  {name} " in done.stdout
    mistyped = run("tran")
    assert (mistyped.exit_code, "Did you mean 'train'?" in mistyped.stderr) == (2, True)
