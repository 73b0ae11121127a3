"""What every command does before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sbora_diffusion.cli.console import GC_THRESHOLD, SPIN_COUNT, boolean, convert, parse_floats, share_cores


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
