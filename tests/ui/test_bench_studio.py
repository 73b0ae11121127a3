"""The studio's benchmark runs end to end, and measures what it says."""

import json
from pathlib import Path

import bench_studio
import pytest
from typer.testing import CliRunner

from .conftest import needed


@pytest.mark.timeout(900)
def test_it_runs(tmp_path: Path) -> None:
    needed("Chromium (apt-get install chromium)", bench_studio.find_chromium())
    out = tmp_path / "studio.json"
    words = ["--rounds", "1", "--tiny", "--out", str(out)]
    outcome = CliRunner().invoke(bench_studio.app, words, catch_exceptions=False)
    assert outcome.exit_code == 0
    result = json.loads(out.read_text())
    assert result["machine"]["clock"] == "wall"
    assert [row["beside"] for row in result["rows"]] == ["nothing"] * 8 + ["a training"] * 3
    assert all(row["ms"] > 0 for row in result["rows"])
