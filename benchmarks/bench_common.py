"""How every benchmark takes its time, and what it writes down: in turns, medians, ratios, one JSON file each."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

RESULTS = Path(__file__).parent / "results"
VERSIONS = """
import json, platform, sys
from importlib.metadata import distributions
there = {each.name: each.version for each in distributions()}
print(json.dumps({"python": platform.python_version()} | {name: there[name] for name in sys.argv[1:] if name in there}))
"""
PACKAGES = ("torch", "peft", "diffusers", "transformers", "bitsandbytes")

Row = dict[str, Any]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:N.")]
Rounds = Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="How often each way has its turn.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Toy sizes, to see that it runs.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where the numbers go.")]


def new_app() -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def prepare(device: str) -> torch.device:
    """The device, ready: one thread on the CPU, a fixed seed.

    Raises:
        typer.BadParameter: no such device here.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise typer.BadParameter(f"got --device {device}, which cannot be used here: {error}") from error
    return torch.device(device)


def seconds(device: torch.device) -> float:
    """A clock: this process's own CPU time, which other programs disturb less, or wall-clock time of a GPU at rest."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def take_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, at_least: float = 0.02
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that does not count.

    Args:
        at_least: a turn repeats its way until that many seconds have passed.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            count, began = 0, seconds(device)
            while count == 0 or seconds(device) - began < at_least:
                run()
                count += 1
            if number:
                times[way].append((seconds(device) - began) / count)
    return times


def compared(times: Mapping[str, Sequence[float]], **about: Any) -> list[Row]:
    """One row a way: the median in milliseconds, and its ratio to those of "peft" and of "base", where they took part.

    Args:
        about: what else stands in each row, before the numbers.
    """
    medians = {way: statistics.median(turns) for way, turns in times.items()}
    rows = []
    for way, median in medians.items():
        row = {**about, "way": way, "ms": round(1e3 * median, 3)}
        row |= {f"of {other}": round(median / medians[other], 3) for other in ("peft", "base") if other in medians}
        rows.append(row)
    return rows


def save(
    name: str,
    device: torch.device,
    rows: Sequence[Row],
    out: Path | None,
    *,
    wall: bool = False,
    python: str = sys.executable,
    **settings: Any,
) -> None:
    """Write results/NAME-DEVICE.json, or `out`.

    Args:
        wall: other processes did the work, on all cores, and the clock was the wall's.
        python: whose environment did it.
    """
    path = out or RESULTS / f"{name}-{device.type}.json"
    arguments = [part for part in sys.argv[1:] if part]
    result = {
        "benchmark": name,
        "command": shlex.join(["python", f"benchmarks/bench_{name}.py", *arguments]),
        "machine": machine(device) | ({"threads": os.cpu_count(), "clock": "wall"} if wall else {}),
        "versions": versions(python),
        "settings": settings,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(path)


def versions(python: str) -> dict[str, str]:
    """Of Python and the packages that count, as far as they are in its environment."""
    asked = subprocess.run([python, "-c", VERSIONS, *PACKAGES], check=True, capture_output=True, text=True)
    return json.loads(asked.stdout)


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on, without the machine's name."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "clock": "wall"}
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "device": models[0] if models else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "clock": "the process's CPU time",
    }
