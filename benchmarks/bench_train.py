"""(g) Where the time of a whole `sbora-diffusion train --concept dog` goes, from the start of the process to its end.

    python benchmarks/bench_train.py [--python FILE] [--rounds 5] [--threads 2] [--tiny] [--out FILE]

First the command as it is, several times: median, least and most. Then one training under Python's profiler, whose own
cost is small here: nearly all time is spent inside single calls of torch (importing is Python all through, and takes
half as long without it). Rows with an arrow are parts of the row above them. Seconds are by the clock on the wall, so
run it on a machine that does nothing else; with --python in an environment as the README's first command makes it, for
packages of the extras that are there are imported, too.
"""

import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_common import Out, Rounds, Row, Tiny, new_app, prepare, save

PARTS = (  # what, and the function's file and name
    ("import packages", "<frozen importlib._bootstrap>", "_find_and_load"),
    ("load the base model", "loading.py", "load_pipeline"),
    ("encode the images", "latents.py", "encode"),
    ("take, or draw, the prior prompts' images", "prior.py", "prior_latents"),
    ("ask for the answers to hold", "latents.py", "answers"),
    ("draw previews, and before and after", "preview.py", "_images"),
    ("steps", "trainer.py", "advance"),
    ("→ forward", "trainer.py", "_predict"),
    ("→ backward", "precision.py", "backward"),
    ("→ optimiser", "precision.py", "step"),
    ("save checkpoints", "checkpoint.py", "save"),
    ("save the concept", "file.py", "save"),
)
RUN = "from sbora_diffusion.cli.app import main; main()"
PROFILED = """
import cProfile, sys
out, sys.argv = sys.argv[1], ["sbora-diffusion", *sys.argv[2:]]
profile = cProfile.Profile()
try:
    profile.runctx("from sbora_diffusion.cli.app import main; main()", {}, {})
finally:
    profile.dump_stats(out)
"""

app = new_app()


@app.command()
def main(
    python: Annotated[str, typer.Option("--python", metavar="FILE", help="Of another environment.")] = sys.executable,
    rounds: Rounds = 5,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Of torch.")] = 2,
    tiny: Tiny = False,
    out: Out = None,
) -> None:
    """Measure, and save the numbers."""
    device = prepare("cpu")
    torch.set_num_threads(threads)
    words = ["train", "--concept", "dog", *(["--set", "steps=2", "--set", "sampling_steps=1"] if tiny else [])]
    python = str(Path(python).absolute())  # not where a link leads: that is outside of its environment
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    seconds = [run([python, "-c", RUN, *words], environment) for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "profile"
        run([python, "-c", PROFILED, str(path), *words], environment)
        rows = plain_rows(seconds) + rows_of(pstats.Stats(str(path)))
    save("train", device, rows, out, wall=True, python=python, rounds=rounds, threads=threads, tiny=tiny)


def run(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Seconds by the clock on the wall that a command takes in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        return time.perf_counter() - began


def plain_rows(seconds: Sequence[float]) -> list[Row]:
    """Of the command without a profiler."""
    told = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return [{"part": f"the command, {what} of {len(seconds)}", "s": round(s, 2)} for what, s in told.items()]


def rows_of(stats: pstats.Stats) -> list[Row]:
    """Seconds of each part, and what is left."""
    told: dict[tuple[str, str], float] = {}
    for (file, _, function), (*_, cumulative, _callers) in stats.stats.items():  # type: ignore[attr-defined]
        key = (Path(file).name, function)
        told[key] = max(told.get(key, 0.0), cumulative)
    whole = stats.total_tt  # type: ignore[attr-defined]
    found = [(what, told.get((file, function), 0.0)) for what, file, function in PARTS]
    rest = whole - sum(seconds for what, seconds in found if not what.startswith("→"))
    parts = [*found, ("everything else", rest), ("the whole, under the profiler", whole)]
    return [{"part": what, "s": round(seconds, 2), "%": round(100 * seconds / whole, 1)} for what, seconds in parts]


if __name__ == "__main__":
    app()
