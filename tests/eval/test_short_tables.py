"""The short tables of the committed comparison."""

import json
from pathlib import Path

from short_tables import differences, means, name_of

RESULTS = Path(__file__).parents[2] / "eval/results/methods.json"


def test_every_row_of_the_committed_results_has_a_name() -> None:
    found = json.loads(RESULTS.read_bytes())
    names = [name_of(row) for row in found["rows"]]
    assert not [name for name in names if ":" in name]
    assert len(means(found["rows"]).splitlines()) == 2 + len({row["variant"] for row in found["rows"]})
    assert "| text single |" in differences(found["differences"])
