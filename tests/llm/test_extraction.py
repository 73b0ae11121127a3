"""Extraction of answers: hand-written cases for every task, with the quirks of the published scripts."""

import pytest

from sbora_diffusion.llm.tasks.protocol import NUMBERS, OPTIONS, judge

RIGHT, WRONG, NONE = (True, False), (False, False), (False, True)  # correct, failed

CASES = [
    ("boolq", "the correct answer is true", "true", RIGHT),
    ("boolq", "untrue", "true", RIGHT),  # anywhere in a word
    ("boolq", "false, not true", "true", WRONG),  # the first counts
    ("boolq", "True", "true", NONE),  # capitals do not
    ("piqa", "the correct answer is solution2", "solution2", RIGHT),
    ("piqa", "Solution1: solution2", "solution1", WRONG),
    ("piqa", "solution3", "solution1", NONE),
    ("social_i_qa", "the correct answer is answer3", "answer3", RIGHT),
    ("social_i_qa", "answer 3", "answer3", NONE),
    ("hellaswag", "the correct answer is ending4", "ending4", RIGHT),
    ("hellaswag", "ending5", "ending4", NONE),
    ("winogrande", "the correct answer is option1", "option1", RIGHT),
    ("winogrande", "option1 or option2", "option2", WRONG),
    ("ARC-Easy", "the correct answer is answer1", "answer1", RIGHT),
    ("ARC-Easy", "answer10", "answer1", RIGHT),
    ("ARC-Challenge", "answer5", "answer5", RIGHT),
    ("ARC-Challenge", "", "answer5", NONE),
    ("openbookqa", "the correct answer is answer4", "answer4", RIGHT),
    ("openbookqa", "not answer1 but answer4", "answer4", WRONG),
    ("MultiArith", "13 + 17 = 30, so 30 - 15 = 15.", "15.0", RIGHT),
    ("MultiArith", "5-3", "-3", RIGHT),  # a minus between numbers is a sign
    ("gsm8k", "The answer is 1,234 dollars", "1234", RIGHT),
    ("gsm8k", "42 is the answer, from step 1", "42", WRONG),  # the last number counts
    ("AddSub", "The answer is 4.0005", "4", RIGHT),  # within 0.001
    ("AddSub", "The answer is 4.002", "4", WRONG),
    ("SingleEq", "It is .5", "5", RIGHT),  # a leading point is ignored
    ("SVAMP", "none at all", "8", NONE),
    ("SVAMP", "8\n\n### Response:\n9", "8", RIGHT),  # further responses do not count
    ("AQuA", "The answer is C", "A", WRONG),
    ("AQuA", "An answer is C", "A", RIGHT),  # the first capital anywhere
    ("AQuA", "a b c", "A", NONE),
    ("AQuA-clean", "An apple costs 3. The answer is (C).", "C", RIGHT),
    ("AQuA-clean", "The answer is A. No: the answer is B", "B", RIGHT),
    ("AQuA-clean", "(D)", "D", RIGHT),
    ("AQuA-clean", "Answer: E", "E", RIGHT),
    ("AQuA-clean", "An apple costs 3", "A", NONE),
    ("AQuA-clean", "the answer is a dollar", "A", NONE),
]


@pytest.mark.parametrize(("task", "text", "answer", "verdict"), CASES)
def test_verdict(task: str, text: str, answer: str, verdict: tuple[bool, bool]) -> None:
    assert judge(task, text, answer) == verdict


def test_every_task_has_a_case() -> None:
    assert {task for task, *_ in CASES} == {*OPTIONS, *NUMBERS, "AQuA", "AQuA-clean"}
    assert (len(OPTIONS), len(NUMBERS)) == (8, 5)
