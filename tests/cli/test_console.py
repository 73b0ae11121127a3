"""What every command does before it does anything."""

import gc
import subprocess
import sys

import pytest
import torch  # noqa: F401

from sbora_diffusion.cli.console import SPIN_COUNT, imported_for_good, share_cores


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_cores_are_shared_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    environment = dict(given)
    monkeypatch.setattr("os.environ", environment)
    share_cores()
    assert environment == expected


IN_A_NEW_PROCESS = """
import atexit, gc
from sbora_diffusion.cli.console import imported_for_good
try:
    with imported_for_good():
        assert not gc.isenabled()
        import sbora_diffusion.library.library
        {then}
except ModuleNotFoundError:
    pass
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000
"""


@pytest.mark.parametrize("then", ["pass", "import no_such_package"])
def test_what_commands_import_is_never_looked_at_again(then: str) -> None:
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS.format(then=then)], check=True)


def test_who_has_imported_torch_before_is_left_alone() -> None:
    frozen = gc.get_freeze_count()
    with imported_for_good():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
