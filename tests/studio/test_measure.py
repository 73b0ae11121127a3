"""What is told of what runs and waits: of evaluations, and of trainings behind them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sbora_diffusion.studio import measure_tab, train_view
from sbora_diffusion.studio.jobs import Job, State
from sbora_diffusion.studio.measure_tab import NONE, result_name
from sbora_diffusion.studio.session import Folders, Workshop


def queue(*jobs: Job) -> Any:
    return SimpleNamespace(all=lambda: list(jobs), said=lambda _: "")


def evaluation(name: str, state: State) -> Job:
    return Job(name=f"eval {name}", arguments=("eval",), state=state)


def test_names_of_results() -> None:
    assert result_name(["dog"], "both", 1) == "dog-in-both-x1"
    names = [f"concept-{number}" for number in range(40)]
    merges = [result_name(names, merged, seeds) for merged in (NONE, "+".join(names)) for seeds in (1, 2)]
    assert len(set(merges)) == 4
    assert all(len(name) == 60 and name.startswith("concept-0-concept-1-") and "-of-40-" in name for name in merges)


def test_a_result_that_is_gone_is_told_once(tmp_path: Path) -> None:
    workshop = Workshop(Folders(adapters=tmp_path, evaluations=tmp_path))
    look = measure_tab.watcher(workshop, queue(evaluation("dog-x1", "done")))
    words, stop, *_, seen = look(("", "", ""))
    assert words == "There is no result &#x27;dog-x1&#x27; any more. Measure again."
    assert stop["visible"] is False
    assert look(seen) == (measure_tab.SKIP,) * 7


@pytest.mark.parametrize(
    ("before", "states", "shown"),
    [
        ("", ["done", "stopped"], "1"),
        ("", ["running", "waiting", "waiting"], "2"),
        ("1", ["running", "stopped"], "0"),
        ("0", ["done", "stopped"], "0"),
    ],
)
def test_what_can_be_stopped_is_shown(tmp_path: Path, before: str, states: list[State], shown: str) -> None:
    """First what is not over, then what was shown before."""
    jobs = queue(*(evaluation(str(number), state) for number, state in enumerate(states)))
    look = measure_tab.watcher(Workshop(Folders(adapters=tmp_path, evaluations=tmp_path)), jobs)
    _, stop, *_, seen = look((f"eval {before}", "", ""))
    assert seen[0] == f"eval {shown}"
    assert stop["visible"] == (states[int(shown)] in ("running", "waiting"))


def test_a_training_waits_for_evaluations_too(tmp_path: Path) -> None:
    jobs = queue(evaluation("dog-x1", "running"), Job(name="cat", arguments=("train",)))
    look = train_view.watcher(Workshop(Folders(adapters=tmp_path, runs=tmp_path)), jobs)
    assert "waiting for 1 before it" in look(None, ("", "", -1, ""))[1]
