"""Functions that the task files call: loading data, prompts, and scoring of answers.

Answers are found in generated texts as by LLM-Adapters' evaluation scripts, flaws included, and in a better way.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from sbora_diffusion.llm.data import evaluation_prompt
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_bytes
from sbora_diffusion.utils.text import parse_json

LETTERS = "ABCD"
SHOTS = 5
MARK = "### Response:"
TOLERANCE = 1e-3  # of numeric answers
_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
OPTIONS = {  # commonsense: the first match counts
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "social_i_qa": _ANSWERS,
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
    "ARC-Easy": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "openbookqa": _ANSWERS,
}
NUMBERS = ("MultiArith", "gsm8k", "AddSub", "SingleEq", "SVAMP")
_STATED = re.compile(r"\banswer\b(?:\s+is\b)?\s*:?\s*(?:option\s*)?\(?([A-E])\b", re.IGNORECASE)
_ONLY_A_LETTER = re.compile(r"\(?([A-E])\)?\s*[.:]?")


def load(data_dir: str = "", folder: str = "", rule: str = "", **_: Any) -> dict[str, Dataset]:
    """Load data_dir/folder/test.json in LLM-Adapters' layout, a list of records with instruction and answer."""
    path = Path(data_dir) / folder / "test.json"
    if not data_dir or not path.is_file():
        raise SboraError(f"the task needs {folder}/test.json", "give LLM-Adapters' dataset folder with --data DIR")
    try:
        records = parse_json(read_bytes(path))
        rows = [{"instruction": r["instruction"], "answer": str(r["answer"]), "rule": rule or folder} for r in records]
    except (ValueError, KeyError, TypeError) as error:
        raise SboraError(f"{path} is not a list of records with instruction and answer ({error!r})") from None
    _check_answers(path, rows)
    return {"test": Dataset.from_list(rows)}


def _check_answers(path: Path, rows: list[dict[str, str]]) -> None:
    """Raise SboraError for answers that no text can match, before hours of generation."""
    if not rows:
        raise SboraError(f"{path} contains no questions")
    for number, row in enumerate(rows):
        rule, answer = row["rule"], row["answer"]
        if not is_answer(rule, answer):
            expected = "a number" if rule in NUMBERS else OPTIONS.get(rule, "A|B|C|D|E").replace("|", ", ")
            raise SboraError(f"{path}, record {number}: got the answer {answer!r}, expected {expected}")


def prompt(doc: dict[str, Any]) -> str:
    """Return LLM-Adapters' evaluation prompt."""
    return evaluation_prompt(doc["instruction"])


def count(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the answer is right, and whether none was found."""
    correct, failed = judge(doc["rule"], results[0], doc["answer"])
    return {"acc": float(correct), "failed": float(failed)}


def load_mmlu(data_dir: str = "", **_: Any) -> dict[str, Dataset]:
    """Load MMLU's validation questions, each with five shots of its subject; the score is a macro mean over subjects.

    The files are data_dir/mmlu/{dev/SUBJECT_dev,val/SUBJECT_val}.csv as the authors have them, or those of the hub.
    """
    local = Path(data_dir) / "mmlu"
    shots, questions = _read_local(local) if data_dir and local.is_dir() else _read_hub()
    _check_shots(shots, questions)
    rows = [
        {
            "text": mmlu_prompt(question, [shot for shot in shots if shot["subject"] == question["subject"]]),
            "gold": question["answer"],
            "macro_over": question["subject"],
        }
        for question in questions
    ]
    return {"validation": Dataset.from_list(rows)}


def mmlu_prompt(question: dict[str, Any], shots: list[dict[str, Any]]) -> str:
    """Return QLoRA's prompt, up to the letter; its files have two blanks before the subject."""
    subject = question["subject"].replace("_", " ")
    text = "\n\n".join(
        [*(_question_text(shot, LETTERS[shot["answer"]]) for shot in shots[:SHOTS]), _question_text(question, "")]
    )
    return f"The following are multiple choice questions (with answers) about  {subject}.\n\n{text}"


def count_mmlu(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Return whether the likeliest letter is right."""
    scores = [score for score, _ in results]
    return {"acc": float(scores.index(max(scores)) == doc["gold"])}


def _check_shots(shots: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    numbers = Counter(shot["subject"] for shot in shots)
    for subject in dict.fromkeys(question["subject"] for question in questions):
        if numbers[subject] < SHOTS:
            raise SboraError(f"{subject} has {numbers[subject]} shots in dev, expected {SHOTS}")


def _question_text(question: dict[str, Any], letter: str) -> str:
    choices = "\n".join(f"{name}. {choice}" for name, choice in zip(LETTERS, question["choices"], strict=True))
    return f"{question['question']}\n{choices}\nAnswer:{' ' * bool(letter)}{letter}"


def _read_local(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return _read_split(folder, "dev"), _read_split(folder, "val")


def _read_split(folder: Path, split: str) -> list[dict[str, Any]]:
    questions = []
    for path in sorted((folder / split).glob(f"*_{split}.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if len(row) != 6 or row[5] not in tuple(LETTERS):
                    raise SboraError(f"{path}, row {number}: expected a question, four choices and a letter")
                answer = LETTERS.index(row[5])
                subject = path.stem.removesuffix(f"_{split}")
                questions.append({"subject": subject, "question": row[0], "choices": row[1:5], "answer": answer})
    if not questions:
        raise SboraError(f"no {folder / split}/SUBJECT_{split}.csv")
    return questions


def _read_hub() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        splits = load_dataset("cais/mmlu", "all")
    except (OSError, ValueError) as error:
        raise SboraError(
            f"cannot load cais/mmlu ({error})", "put the csv files into DIR/mmlu, and use --data DIR"
        ) from None
    return [dict(row) for row in splits["dev"]], [dict(row) for row in splits["validation"]]  # type: ignore[index]


def response(text: str) -> str:
    """Return the first response only: models continue with further ones."""
    return text.split(MARK)[0].strip()


def first_option(task: str, text: str) -> str | None:
    """Return the first of the task's options, in lower case only, as commonsense_evaluate.py does."""
    found = re.search(OPTIONS[task], text)
    return found[0] if found else None


def last_number(text: str) -> float | None:
    """Return the last number without thousands separators, as evaluate.py does: -3 of "5-3", 16 of "16."."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else None


def first_letter(text: str) -> str | None:
    """Return the first capital from A to E anywhere, as evaluate.py does: A of "An apple"."""
    found = re.search("A|B|C|D|E", text)
    return found[0] if found else None


def stated_letter(text: str) -> str | None:
    """Return the last letter stated as the answer ("the answer is (B)"), or the letter that is the whole first line."""
    stated = [match[1] for match in _STATED.finditer(text) if match[1].isupper()]
    if stated:
        return stated[-1]
    letter = _ONLY_A_LETTER.fullmatch(text.strip().split("\n")[0].strip())
    return letter[1] if letter else None


def judge(task: str, text: str, answer: str) -> tuple[bool, bool]:
    """Return whether a text answers a question of an LLM-Adapters task, and whether no answer was found in it."""
    found = _extract(task)(response(text))
    if found is None:
        return False, True
    if isinstance(found, float):
        return abs(float(answer) - found) <= TOLERANCE, False
    return found == answer, False


def is_answer(task: str, answer: str) -> bool:
    """Return whether a reference answer can be matched at all: whether its own text is judged right."""
    try:
        return judge(task, answer, answer) == (True, False)
    except ValueError:
        return False


def _extract(task: str) -> Callable[[str], str | float | None]:
    if task in OPTIONS:
        return lambda text: first_option(task, text)
    if task in NUMBERS:
        return last_number
    return {"AQuA": first_letter, "AQuA-clean": stated_letter}[task]
