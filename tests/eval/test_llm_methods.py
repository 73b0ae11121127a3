"""The eight methods on one language model: questions, likelihoods, cells that are resumed, the table."""

import json
from argparse import Namespace
from pathlib import Path

import llm_methods
import pytest
import torch
from filelock import FileLock
from llm_questions import Question, parse, scores

from sbora_diffusion.llm.base import load_base

from ..llm.tiny import save_base

RECORD = {
    "instruction": "Please choose the correct answer to the question: Which? \n\n"
    "Answer1: one Answer2: two and Answer3: x\n\nAnswer format: answer1/answer2/answer3",
    "answer": "answer2",
}


def arguments(work: Path, *words: str) -> list[str]:
    return ["llm_methods.py", "--data", str(work / "data"), "--work", str(work), "--out", str(work / "out"), *words]


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Prepare a work folder with a tiny model instead of the wheel's."""
    save_base(tmp_path / "base")
    (tmp_path / "data" / "ARC-Easy").mkdir(parents=True)
    (tmp_path / "data" / "ARC-Easy" / "test.json").write_text(json.dumps([RECORD] * 3))
    (tmp_path / "train.json").write_text(json.dumps([parse(RECORD).record] * 4))
    quick = {"steps": "2", "batch-size": "2", "longest": "50", "questions": "2"}
    words = [word for name, value in quick.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", arguments(tmp_path, *words))
    made = llm_methods.parse_arguments()
    settings = {key: getattr(made, key) for key in (*llm_methods.SETTINGS, "learning_rate")}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return made


def test_record_becomes_a_question() -> None:
    assert parse(RECORD) == Question("Which?", ("one", "two and", "x"), 1)
    assert parse(RECORD).record == {"instruction": "Question: Which?\nAnswer:", "output": " two and"}


def test_likelihoods_match_whole_sequences(tmp_path: Path) -> None:
    model, tokenizer = load_base(str(save_base(tmp_path)))
    question = parse(RECORD)
    for choice, got in zip(question.choices, scores(model, tokenizer, question), strict=True):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question.prompt, f"{question.prompt} {choice}"))
        with torch.no_grad():
            likely = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(likely[place - 1, whole[place]].item() for place in range(len(prompt), len(whole)))
        assert got == pytest.approx(expected / len(choice), rel=1e-4)


def test_cell_is_trained_measured_and_resumed(options: Namespace) -> None:
    cells = [llm_methods.make_cell((method, "none"), options) for method in ("base", "sbora-fa")]
    assert [len(cell["right"]) for cell in cells] == [2, 2]
    assert (cells[1]["parameters"], len(cells[1]["losses"])) == (9216, 2)
    assert cells[1]["likelihood"] != cells[0]["likelihood"]
    again = llm_methods.make_cell(("sbora-fa", "none"), options)  # as after a kill between training and measuring
    assert again == cells[1]
    lines = llm_methods.table(cells).splitlines()
    assert lines[2].startswith("| before | | ")
    assert lines[3].startswith("| SBoRA-FA | 9,216 | ")


def test_cell_of_another_process_is_skipped(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = options.cell_path(("base", "none"))
    path.parent.mkdir()
    monkeypatch.setattr("sys.argv", [*arguments(options.work), "--cell", "base", "none"])
    with FileLock(path.with_suffix(".lock")):
        llm_methods.main()
    assert not path.exists()


def test_other_settings_are_rejected(options: Namespace) -> None:
    options.steps = 3
    with pytest.raises(SystemExit, match="contains cells of other settings"):
        llm_methods.prepare(options)


def test_results_contain_the_command_of_each_cell(options: Namespace) -> None:
    path = options.cell_path(("base", "none"))
    path.parent.mkdir()
    path.write_text(json.dumps(llm_methods.make_cell(("base", "none"), options)))
    llm_methods.write_results(options)
    results = json.loads((options.work / "out.json").read_text())
    assert (results["steps"], results["learning_rate"]) == (2, 0.001)
    assert results["cells"][0]["command"].startswith("python llm_methods.py --data ")
    assert "--cell" not in results["cells"][0]["command"]
