"""How long it takes to write an adapter into SD1.5's attention weights and take it out, against PEFT's merge, unmerge.

    python eval/bench_write.py [--rounds 15] [--out eval/results/write.json]

One process, CPU, fp32, rank 8, random weights in the shapes of Stable Diffusion 1.5's 128 attention layers (93 million
entries). The three ways take turns in every round; the result is the ratio of the medians.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
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
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each way has its turn.")] = 15,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the numbers go.")] = RESULT,
) -> None:
    """Measure, save, and show."""
    result = json.dumps(measure(attention_stack(), attention_stack(), rounds), indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(result + "\n")
    typer.echo(result)


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


def measure(ours: nn.ModuleDict, theirs: nn.ModuleDict, rounds: int) -> dict[str, object]:
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
    seconds = take_turns(ways, rounds)
    assert all(torch.equal(weight, after) for weight, after in zip(before, copies(ours), strict=True))
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "command": "python eval/bench_write.py",
        "rank": RANK,
        "layers": sum(isinstance(module, nn.Linear) for module in ours.modules()),
        "entries": sum(parameter.numel() for parameter in ours.parameters()),
        "dtype": "float32",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()},
        "median_ms": {way: round(1e3 * median, 3) for way, median in medians.items()},
        "spread_ms": {way: [round(1e3 * min(t), 3), round(1e3 * max(t), 3)] for way, t in seconds.items()},
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


def take_turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each way in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def copies(stack: nn.Module) -> list[Tensor]:
    return [parameter.clone() for parameter in stack.parameters()]


if __name__ == "__main__":
    app()
