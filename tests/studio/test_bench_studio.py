"""The studio's benchmark runs end to end, and measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import bench_studio
import pytest

from .conftest import needed


@pytest.mark.timeout(900)
def test_it_runs(tmp_path: Path) -> None:
    needed("Chromium (apt-get install chromium)", bench_studio.find_chromium())
    out = tmp_path / "studio.json"
    words = ["--rounds", "1", "--tiny", "--out", str(out)]
    # a process of its own: Playwright allows one at a time in each, and the page's tests have theirs
    subprocess.run([sys.executable, bench_studio.__file__, *words], check=True)
    result = json.loads(out.read_text())
    assert result["machine"]["clock"] == "wall"
    assert [row["beside"] for row in result["rows"]] == ["nothing"] * 8 + ["a training"] * 3
    assert all(row["ms"] > 0 for row in result["rows"])
