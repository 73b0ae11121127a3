"""The accuracy table of language models: rows and cells."""

from dataclasses import replace
from typing import Any

from sbora_diffusion.evaluation.llm_accuracy import Measured, accuracy_table, to_json
from sbora_diffusion.llm.evaluate import TaskScores


def measured(method: str, seed: int, correct: list[float], failed: list[float], **about: Any) -> Measured:
    about = {"method": method, "parameters": 1234, "config": {"rank": 8, "seed": seed}} | about
    scores = {"adapters_boolq": TaskScores(metric="acc", correct=correct, failed=failed)}
    return Measured(
        source="run", about=about, scores=scores | {"arc_easy": TaskScores(metric="acc", correct=[1.0], failed=[])}
    )


def test_seeds_share_a_row_and_methods_do_not() -> None:
    runs = [measured("lora", 0, [1.0, 1.0], [0.0, 0.0]), measured("lora", 1, [0.0, 0.0], [1.0, 0.0])]
    other = measured("sbora-fb", 0, [1.0, 1.0], [0.0, 0.0], quantize="nf4")
    head, _, lora, sbora = accuracy_table([*runs, other]).split("\n")
    assert head == "| model | parameters | seeds | boolq | arc_easy | mean | no answer found |"
    assert lora == "| LoRA r=8 | 1,234 | 2 | 50.0% [0.0%, 100.0%] | 100.0% [100.0%, 100.0%] | 75.0% | 25.0% |"
    assert sbora.startswith("| QSBoRA-FB r=8 | 1,234 | 1 | 100.0% [100.0%, 100.0%] |")


def test_other_settings_have_their_own_row() -> None:
    one = measured("lora", 0, [1.0], [0.0])
    other = measured("lora", 0, [1.0], [0.0], config={"rank": 8, "seed": 1, "learning_rate": 1.0})
    assert len(accuracy_table([one, other]).split("\n")) == 4


def test_other_data_have_their_own_row_that_names_its_runs() -> None:
    runs = [measured("lora", n, [1.0], [0.0], data=f"{data}.json") for n, data in enumerate("aab")]
    runs = [replace(run, source=f"runs/{n}") for n, run in enumerate(runs)]
    _, _, first, second = accuracy_table(runs).split("\n")
    assert first.startswith("| LoRA r=8 (runs/0, runs/1) | 1,234 | 2 |")
    assert second.startswith("| LoRA r=8 (runs/2) | 1,234 | 1 |")


def test_no_failure_column_if_no_task_reports_failures() -> None:
    scores = {"arc_easy": TaskScores(metric="acc", correct=[1.0, 0.0], failed=[])}
    table = accuracy_table([Measured(source="", about={}, scores=scores)])
    assert table.split("\n")[0] == "| model | parameters | seeds | arc_easy | mean |"
    assert "| base |  | 1 | 50.0%" in table


def test_json_contains_every_question() -> None:
    about = to_json(measured("dora", 3, [1.0, 0.0], [0.0, 1.0]))
    assert about["label"] == "DoRA r=8"
    expected = {"metric": "acc", "score": 0.5, "failure_rate": 0.5, "questions": 2, "correct": [1.0, 0.0]}
    assert about["tasks"]["adapters_boolq"] == expected
