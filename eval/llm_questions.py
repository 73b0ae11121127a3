"""Multiple-choice questions for a language model ("Question: …, Answer:"), and the likelihood of each choice."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_RECORD = re.compile(r"to the question: (.*?)\n\nAnswer1: (.*)\n\nAnswer format", re.DOTALL)


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        """The prompt of ARC in lm-evaluation-harness."""
        return f"Question: {self.text}\nAnswer:"

    @property
    def record(self) -> dict[str, str]:
        """A training record for the template "plain"."""
        return {"instruction": self.prompt, "output": f" {self.choices[self.right]}"}


def parse(record: dict[str, Any]) -> Question:
    """Parse a record of LLM-Adapters' ARC files."""
    match = _RECORD.search(record["instruction"])
    assert match is not None, record["instruction"]
    choices = re.split(r"\s*Answer\d: ", match[2])
    return Question(match[1].strip(), tuple(choice.strip() for choice in choices), int(record["answer"][-1]) - 1)


def chosen(path: Path, tokenizer: Any, longest: int, number: int) -> list[Question]:
    """Return the first questions, in a fixed random order, that have at most `longest` tokens with any choice."""
    questions = [parse(record) for record in json.loads(path.read_text())]
    random.Random(0).shuffle(questions)
    short = [q for q in questions if len(tokenizer(q.text + max(q.choices, key=len))["input_ids"]) <= longest]
    return short[:number]


@torch.inference_mode()
def scores(model: Any, tokenizer: Any, question: Question) -> list[float]:
    """Return the log-likelihood per character of each choice; the question is encoded once."""
    prompt = tokenizer(question.prompt)["input_ids"]
    answers = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in question.choices]
    read = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    read.past_key_values.batch_repeat_interleave(len(answers))
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
    first = read.logits.expand(len(answers), -1, -1)  # (choices, 1, words)
    rest = model(input_ids=ids[:, :-1], past_key_values=read.past_key_values).logits if longest > 1 else first[:, :0]
    logits = torch.cat([first, rest], 1).log_softmax(-1)  # (choices, tokens, words)
    found = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return [float(found[row, : len(answer)].sum()) / len(question.choices[row]) for row, answer in enumerate(answers)]
