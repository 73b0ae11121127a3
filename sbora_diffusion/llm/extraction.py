"""Extract answers from generated texts: as LLM-Adapters' evaluation scripts do, flaws included, and a better way."""

import re
from collections.abc import Callable

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
