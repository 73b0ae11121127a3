"""(i) How long threads spin while they wait for each other: alone, and beside a program that keeps one core busy.

    python benchmarks/bench_threads.py [--rounds 3] [--tiny] [--out FILE]

Convolutions of emoji64's size on two threads, in fresh processes. "base" is OpenMP's own default; "ours" is what
`sbora-diffusion` sets, GOMP_SPINCOUNT=10000: a thread that waits gives its core away sooner. CPU is what both threads
used together: time that was spun away counts.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from bench_common import Out, Rounds, Row, Tiny, new_app, save

from sbora_diffusion.cli.console import SPIN_COUNT

WORK = """
import sys, time, torch
torch.manual_seed(0)
layer, x = torch.nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False), torch.randn(64, 64, 16, 16)
def run(count):
    for _ in range(count):
        layer(x).relu_().add_(1).mul_(2)
run(5)
wall, cpu = time.perf_counter(), time.process_time()
run(int(sys.argv[1]))
print(time.perf_counter() - wall, time.process_time() - cpu)
"""

app = new_app()


@app.command()
def main(rounds: Rounds = 3, tiny: Tiny = False, out: Out = None) -> None:
    """Measure, and save the numbers."""
    count, rows = 3 if tiny else 300, []
    if not tiny:
        rows += measured(rounds, count, beside="nothing")
    with busy():
        rows += measured(rounds, count, beside="a busy core")
    save("threads", torch.device("cpu"), rows, out, rounds=rounds, tiny=tiny, wall=True)


def measured(rounds: int, count: int, beside: str) -> list[Row]:
    """Medians of both ways, which take turns."""
    ways = {"base": {}, "ours": {"GOMP_SPINCOUNT": SPIN_COUNT}}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    for _ in range(rounds):
        for way, changes in ways.items():
            environment = plain | {"OMP_NUM_THREADS": "2"} | changes
            command = [sys.executable, "-c", WORK, str(count)]
            said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
            times[way].append((float(said[0]), float(said[1])))
    medians = {way: [1e3 * statistics.median(turns) / count for turns in zip(*times[way], strict=True)] for way in ways}
    return [
        {"beside": beside, "way": way, "ms": round(wall, 3), "CPU, ms": round(cpu, 3)}
        | {"of base": round(wall / medians["base"][0], 3)}
        for way, (wall, cpu) in medians.items()
    ]


@contextmanager
def busy() -> Iterator[None]:
    """A program that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    app()
