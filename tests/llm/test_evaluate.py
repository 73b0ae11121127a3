"""The published tasks in lm-evaluation-harness: prompts, generation and scoring."""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from lm_eval.tasks import TaskManager

from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.evaluate import TASKS, Harness, TaskScores, _scores
from sbora_diffusion.llm.tasks.protocol import count, count_mmlu, load, load_mmlu, mmlu_prompt
from sbora_diffusion.utils.errors import SboraError

from .tiny import ANSWERS, save_tasks

GAP = " " * 16
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{GAP}### Instruction:\n{GAP}{{}}\n\n{GAP}### Response:\n{GAP}"
)
COMMONSENSE = list(ANSWERS)[:8]
ARITHMETIC = list(ANSWERS)[8:]


def name_of(task: str) -> str:
    return f"adapters_{task.lower().replace('-', '_')}"


def loaded(name: str, data: Path) -> Any:
    metadata: Any = {"data_dir": str(data)}
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load(name)["tasks"][name]


@pytest.mark.parametrize("task", ANSWERS)
def test_task_prompts_and_scores_as_published(task: str, tasks: Path) -> None:
    found = loaded(name_of(task), tasks)
    [doc, _] = found.test_docs()
    assert found.doc_to_text(doc) == PROMPT.format(f"{task} 0?")
    limit = 32 if task in COMMONSENSE else 256
    options = {"until": [], "do_sample": False, "num_beams": 4, "max_gen_toks": limit}
    assert found.config.generation_kwargs == options
    assert found.process_results(doc, [f"The answer is {ANSWERS[task]}."]) == {"acc": 1.0, "failed": 0.0}
    assert found.process_results(doc, ["?"]) == {"acc": 0.0, "failed": 1.0}


def test_clean_aqua_needs_a_stated_letter(tasks: Path) -> None:
    [doc, _] = loaded("adapters_clean_aqua", tasks).test_docs()
    assert count(doc, ["An apple"]) == {"acc": 0.0, "failed": 1.0}
    assert count(doc, ["The answer is A"]) == {"acc": 1.0, "failed": 0.0}


def test_groups_are_the_published_tables(tasks: Path) -> None:
    assert Harness(["adapters_commonsense"], tasks).tasks == [name_of(task) for task in COMMONSENSE]
    assert Harness(["adapters_arithmetic"], tasks).tasks == [name_of(task) for task in ARITHMETIC]
    clean = Harness(["adapters_clean_arithmetic", "adapters_svamp"], tasks).tasks
    assert clean == ["adapters_gsm8k", "adapters_clean_aqua", "adapters_svamp"]


def test_mmlu_prompt_is_that_of_qlora() -> None:
    question = {"subject": "world_history", "question": "Who?", "choices": ["w", "x", "y", "z"], "answer": 1}
    text = "Who?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    head = "The following are multiple choice questions (with answers) about  world history.\n\n"  # two blanks
    assert mmlu_prompt(question, [question]) == f"{head}{text} B\n\n{text}"
    assert mmlu_prompt(question, [question] * 7).count("Answer: B") == 5


def test_mmlu_mean_is_a_macro_mean(tasks: Path) -> None:
    docs = loaded("qlora_mmlu", tasks).test_docs()
    right, wrong = [(0.0, False), (1.0, False), (0.0, False), (0.0, False)], [(1.0, False)] + [(0.0, False)] * 3
    samples = [{"doc": doc} | count_mmlu(doc, right if "world history" in doc["text"] else wrong) for doc in docs]
    assert len(samples) == 4
    means = [_scores({"samples": {"qlora_mmlu": samples[:number]}}, "qlora_mmlu").score for number in (3, 4)]
    assert means == pytest.approx([0.0, 0.5])  # one subject of one, none right; of two, one question of four


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("val/anatomy_val.csv", "who?,w,x,y,z,", "row 1: expected a question"),
        ("val/anatomy_val.csv", "who?,w,x,y,z,BC", "row 1: expected a question"),
        ("dev/anatomy_dev.csv", "who?,w,x,y,z,B", "anatomy has 1 shots in dev, expected 5"),
    ],
)
def test_defects_of_mmlu_files(file: str, text: str, message: str, tmp_path: Path) -> None:
    (save_tasks(tmp_path) / "mmlu" / file).write_text(text)
    with pytest.raises(SboraError, match=message):
        load_mmlu(data_dir=str(tmp_path))


def test_harness_runs_on_a_model(base: str, tasks: Path) -> None:
    model, tokenizer = load_base(base)
    scores = Harness(["adapters_boolq", "adapters_svamp", "qlora_mmlu"], tasks).run(model, tokenizer, 2, limit=1)
    assert list(scores) == ["adapters_boolq", "adapters_svamp", "qlora_mmlu"]
    assert scores["adapters_boolq"].failed == [1.0]  # noise holds no "true"
    assert scores["adapters_boolq"].score == 0.0
    assert scores["qlora_mmlu"].failure_rate is None


def save_arc(folder: Path, questions: list[dict[str, Any]]) -> None:
    """Write ARC into a folder of its hub name, where `datasets` looks first."""
    splits = ("train", "validation", "test")
    (folder / "ARC-Easy").mkdir(parents=True)
    for split in splits:
        (folder / "ARC-Easy" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    files = [f"  - split: {split}\n    path: ARC-Easy/{split}.jsonl" for split in splits]
    lines = ["---", "configs:", "- config_name: ARC-Easy", "  data_files:", *files, "---"]
    (folder / "README.md").write_text("\n".join(lines))


def likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    before, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        words = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(words[place - 1, ids[place]].item() for place in range(before, len(ids)))


def test_task_of_the_harness_by_name(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the harness's thousands of tasks only ARC is read, the others take 15 seconds."""
    arc = Path(lm_eval.tasks.__file__).parent / "arc" / "index.py"
    monkeypatch.setattr(sys.modules[TaskManager.__module__], "__file__", str(arc))
    choices = ["one", "two", "many"]
    choice = {"text": choices, "label": ["A", "B", "C"]}
    questions = [
        {"id": str(n), "question": f"What is {n}?", "choices": choice, "answerKey": "ABC"[n % 3]} for n in range(6)
    ]
    save_arc(tmp_path / "allenai" / "ai2_arc", questions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, tokenizer = load_base(base)
    scores = Harness(["arc_easy"], None).run(model, tokenizer, 2, limit=None)["arc_easy"]
    prompts = [f"Question: {question['question']}\nAnswer:" for question in questions]
    found = [[likelihood(model, tokenizer, prompt, f" {choice}") for choice in choices] for prompt in prompts]
    assert scores.metric == "acc"
    assert scores.correct == [float(max(range(3), key=of.__getitem__) == n % 3) for n, of in enumerate(found)]


def test_group_of_groups_has_the_questions_of_its_tasks() -> None:
    """As in mmlu: only the innermost tasks have samples, and a task may be in two groups."""
    samples = {"a": [{"acc": 1.0, "filter": "none"}], "b": [{"acc": 0.0, "filter": "none"}], "c": [{"acc": 1.0}]}
    found = {"group_subtasks": {"all": ["stem", "c"], "stem": ["a", "b"], "a": []}, "samples": samples}
    assert _scores(found, "all").correct == [1.0, 0.0, 1.0]
    assert _scores(found, "a").correct == [1.0]


def test_scores() -> None:
    assert TaskScores(metric="acc", correct=[1.0, 0.0, 0.0, 0.0], failed=[0.0, 1.0, 0.0, 0.0]).failure_rate == 0.25


def test_defects(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(SboraError, match=r"needs boolq/test\.json"):
        load(data_dir=str(tmp_path), folder="boolq")
    with pytest.raises(SboraError, match=r"needs boolq/test\.json"):
        load(folder="boolq")
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([{"instruction": "a"}]))
    with pytest.raises(SboraError, match="is not a list of records with instruction and answer"):
        load(data_dir=str(tmp_path), folder="boolq")
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_text(
        json.dumps([{"instruction": "a", "answer": answer} for answer in (-3.5, "1,234")])
    )
    with pytest.raises(SboraError, match="record 1: got the answer '1,234', expected a number"):
        load(data_dir=str(tmp_path), folder="gsm8k")
    (tmp_path / "boolq" / "test.json").write_text(json.dumps([{"instruction": "a", "answer": "True"}]))
    with pytest.raises(SboraError, match="record 0: got the answer 'True', expected true, false"):
        load(data_dir=str(tmp_path), folder="boolq")
    (tmp_path / "boolq" / "test.json").write_text("[]")
    with pytest.raises(SboraError, match=r"boolq/test\.json contains no questions"):
        load(data_dir=str(tmp_path), folder="boolq")
    with pytest.raises(SboraError, match="unknown tasks adapters_nothing"):
        Harness(["adapters_nothing"], tasks)
