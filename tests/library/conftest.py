"""Fixtures of the library tests."""

from pathlib import Path

import pytest

from sbora_diffusion.library.library import Library


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "adapters")
