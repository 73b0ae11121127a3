"""The answer in what a model wrote, as LLM-Adapters' evaluation scripts find it, flaws included, and better ones."""

import re
from collections.abc import Callable

MARK = "### Response:"
TOLERANCE = 1e-3  # of numbers
_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
OPTIONS = {  # commonsense: the first of these counts
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
_ALONE = re.compile(r"\(?([A-E])\)?\s*[.:]?")


def response(text: str) -> str:
    """What belongs to the first response: models go on with more of them."""
    return text.split(MARK)[0].strip()


def first_option(task: str, text: str) -> str | None:
    """The first of the task's options, in lower case only, as in commonsense_evaluate.py."""
    found = re.search(OPTIONS[task], text)
    return found[0] if found else None


def last_number(text: str) -> float | None:
    """The last number without thousands' commas, as in evaluate.py: "5-3" ends in -3, "16." is 16."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else None


def first_letter(text: str) -> str | None:
    """The first capital from A to E anywhere, as in evaluate.py: "An apple" is A."""
    found = re.search("A|B|C|D|E", text)
    return found[0] if found else None


def stated_letter(text: str) -> str | None:
    """The letter that is said to be the answer ("the answer is (B)", the last one), or is all of the first line."""
    stated = [match[1] for match in _STATED.finditer(text) if match[1].isupper()]
    if stated:
        return stated[-1]
    alone = _ALONE.fullmatch(text.strip().split("\n")[0].strip())
    return alone[1] if alone else None


def judge(task: str, text: str, answer: str) -> tuple[bool, bool]:
    """Whether a text answers a question of an LLM-Adapters task, and whether no answer was found in it."""
    found = _extract(task)(response(text))
    if found is None:
        return False, True
    if isinstance(found, float):
        return abs(float(answer) - found) <= TOLERANCE, False
    return found == answer, False


def is_answer(task: str, answer: str) -> bool:
    """Whether a question's answer is one that a text can give: its own text is right."""
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
