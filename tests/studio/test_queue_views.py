"""The views of running and waiting evaluations, and of trainings behind them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sbora_diffusion.studio import evaluate_tab, train_view
from sbora_diffusion.studio.evaluate_tab import NONE, result_name
from sbora_diffusion.studio.jobs import Job, State
from sbora_diffusion.studio.session import Folders, Session


def queue(*jobs: Job) -> Any:
    def of_command(command: str = "") -> list[Job]:
        return [job for job in jobs if command in ("", job.arguments[0])]

    return SimpleNamespace(all=of_command, output=lambda _: "")


def evaluation(name: str, state: State) -> Job:
    return Job(name=f"eval {name}", arguments=("eval",), state=state)


def test_names_of_results() -> None:
    assert result_name(["dog"], "both", 1) == "dog-in-both-x1"
    names = [f"concept-{number}" for number in range(40)]
    merges = [result_name(names, merged, seeds) for merged in (NONE, "+".join(names)) for seeds in (1, 2)]
    assert len(set(merges)) == 4
    assert all(len(name) == 60 and name.startswith("concept-0-concept-1-") and "-of-40-" in name for name in merges)


def test_a_deleted_result_is_reported_once(tmp_path: Path) -> None:
    session = Session(Folders(adapters=tmp_path, evaluations=tmp_path))
    update = evaluate_tab.watcher(session, queue(evaluation("dog-x1", "done")))
    status, stop, *_, shown = update(("", "", ""))
    assert status == "The result &#x27;dog-x1&#x27; no longer exists. Evaluate again."
    assert stop["visible"] is False
    assert update(shown) == (evaluate_tab.SKIP,) * 7


@pytest.mark.parametrize(
    ("before", "states", "shown"),
    [
        ("", ["done", "stopped"], "1"),
        ("", ["running", "waiting", "waiting"], "2"),
        ("1", ["running", "stopped"], "0"),
        ("0", ["done", "stopped"], "0"),
    ],
)
def test_active_evaluations_are_shown_first(tmp_path: Path, before: str, states: list[State], shown: str) -> None:
    """Then the one shown before."""
    jobs = queue(*(evaluation(str(number), state) for number, state in enumerate(states)))
    update = evaluate_tab.watcher(Session(Folders(adapters=tmp_path, evaluations=tmp_path)), jobs)
    _, stop, *_, now = update((f"eval {before}", "", ""))
    assert now[0] == f"eval {shown}"
    assert stop["visible"] == (states[int(shown)] in ("running", "waiting"))


def test_a_training_waits_for_evaluations_too(tmp_path: Path) -> None:
    jobs = queue(evaluation("dog-x1", "running"), Job(name="cat", arguments=("train",)))
    update = train_view.watcher(Session(Folders(adapters=tmp_path, runs=tmp_path)), jobs)
    assert "waiting for 1 earlier job<" in update(None, ("", "", -1, ""))[1]
