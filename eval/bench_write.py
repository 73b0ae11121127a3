"""How long it takes to write an adapter into SD1.5's attention weights and take it out, against PEFT's merge, unmerge.

    python eval/bench_write.py [--processes 5] [--rounds 9] [--out eval/results/write.json]

CPU, fp32, rank 8, random weights in the shapes of Stable Diffusion 1.5's 128 attention layers (94 million entries). The
three ways take turns in every round; the result is the ratio of the medians, of wall-clock time and of the process's
own CPU time, which other programs on the machine disturb less. Several fresh processes, because how fast PEFT's large
temporary matrices are allocated differs from one to the next.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sbora_diffusion.adapter.basis import Interval, Side, indices
from sbora_diffusion.adapter.file import Factor
from sbora_diffusion.adapter.written import WrittenWeights

RANK, CONTEXT = 8, 768  # CONTEXT: what cross-attention's keys and values read
BLOCKS = {320: 5, 640: 5, 1280: 6}  # transformer blocks of each width
RESULT = Path(__file__).parent / "results" / "write.json"
TARGETS = ("to_q", "to_k", "to_v", "to_out")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="How many, one after the other.")] = 5,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each way has its turn in each.")] = 9,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the numbers go.")] = RESULT,
) -> None:
    """Measure, save, and show."""
    fresh = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with fresh:
        runs = list(fresh.map(measure_sd15, [rounds] * processes))
    result = json.dumps(report(runs, rounds), indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(result + "\n")
    typer.echo(result)


def measure_sd15(rounds: int) -> dict[str, Any]:
    """In a process of its own."""
    return measure(attention_stack(), attention_stack(), rounds)


def report(runs: Sequence[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """The runs, and the range of how many times faster than PEFT ours were in them."""
    ranges = {}
    for clock in ("wall", "cpu"):
        factors = {way: [run[clock]["times_faster"][way] for run in runs] for way in ("fa", "fb")}
        ranges[clock] = {way: [min(values), max(values)] for way, values in factors.items()}
    return {
        "command": "python eval/bench_write.py",
        "rank": RANK,
        "dtype": "float32",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()},
        "times_faster": ranges,
        "processes": list(runs),
    }


def attention_stack() -> nn.ModuleDict:
    """The attention layers of SD1.5's U-Net, nothing else."""
    stack = nn.ModuleDict()
    for width, count in BLOCKS.items():
        for number in range(count):
            for name, context in (("attn1", width), ("attn2", CONTEXT)):
                inputs = (width, context, context, width)
                layers = {
                    target: nn.Linear(size, width, bias=False) for target, size in zip(TARGETS, inputs, strict=True)
                }
                stack[f"block_{width}_{number}_{name}"] = nn.ModuleDict(layers)
    return stack.requires_grad_(False)


def measure(ours: nn.ModuleDict, theirs: nn.ModuleDict, rounds: int) -> dict[str, Any]:
    """Seconds of write + restore, and of merge + unmerge, in turns."""
    written = WrittenWeights(ours)
    adapters: dict[Side, dict[str, Factor]] = {"fa": random_factors(ours, "fa"), "fb": random_factors(ours, "fb")}
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
    model: Any = get_peft_model(theirs, config)  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    before = copies(ours)

    def write_and_restore(side: Side) -> Callable[[], None]:
        def run() -> None:
            written.write("concept", adapters[side], side)
            written.restore("concept")

        return run

    def merge_and_unmerge() -> None:
        model.base_model.merge_adapter()
        model.base_model.unmerge_adapter()

    ways = {"fa": write_and_restore("fa"), "fb": write_and_restore("fb"), "peft": merge_and_unmerge}
    wall, cpu = take_turns(ways, rounds)
    assert all(torch.equal(weight, after) for weight, after in zip(before, copies(ours), strict=True))
    return {
        "layers": sum(isinstance(module, nn.Linear) for module in ours.modules()),
        "entries": sum(parameter.numel() for parameter in ours.parameters()),
        "wall": summary(wall),
        "cpu": summary(cpu),
    }


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and fastest round in milliseconds, and how many times faster than PEFT ours are."""
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "median_ms": {way: round(1e3 * median, 2) for way, median in medians.items()},
        "fastest_ms": {way: round(1e3 * min(times), 2) for way, times in seconds.items()},
        "times_faster": {way: round(medians["peft"] / medians[way], 1) for way in ("fa", "fb")},
    }


def random_factors(stack: nn.Module, side: Side) -> dict[str, Factor]:
    """An adapter for every layer, at the first interval."""
    factors = {}
    for name, layer in stack.named_modules():
        if isinstance(layer, nn.Linear):
            dim = layer.in_features if side == "fa" else layer.out_features
            size = (layer.out_features, RANK) if side == "fa" else (RANK, layer.in_features)
            factors[name] = Factor(indices(name, dim, Interval(0, RANK), 0), 0.01 * torch.randn(size))
    return factors


def take_turns(
    ways: dict[str, Callable[[], None]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall-clock and CPU seconds of each way in each round, after one round that does not count."""
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            if number:
                wall[way].append(time.perf_counter() - start)
                cpu[way].append(time.process_time() - start_cpu)
    return wall, cpu


def copies(stack: nn.Module) -> list[Tensor]:
    return [parameter.clone() for parameter in stack.parameters()]


if __name__ == "__main__":
    app()
