"""(g) Where the time of a whole `sbora-diffusion train --concept dog` goes, from the start of the process to its end.

    python benchmarks/bench_train.py [--threads 2] [--tiny] [--out FILE]

One training in a process of its own, under Python's profiler, whose own cost is small here: nearly all time is spent
inside single calls of torch (importing is Python all through, and takes half as long without it). Rows with an arrow
are parts of the row above them. Seconds are by the clock on the wall, so run it on a machine that does nothing else.
"""

import pstats
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_common import Out, Row, Tiny, new_app, prepare, save

PARTS = (  # what, and the function's file and name
    ("import packages", "<frozen importlib._bootstrap>", "_find_and_load"),
    ("load the base model", "loading.py", "load_pipeline"),
    ("encode the pictures", "latents.py", "encode"),
    ("draw the prior prompts", "latents.py", "draw_latents"),
    ("ask for the answers to hold", "latents.py", "answers"),
    ("draw previews, and before and after", "preview.py", "_pictures"),
    ("steps", "run.py", "advance"),
    ("→ forward", "run.py", "_predict"),
    ("→ backward", "precision.py", "backward"),
    ("→ optimiser", "precision.py", "step"),
    ("save checkpoints", "run_folder.py", "save"),
    ("save the concept", "file.py", "save"),
)
RUN = """
import cProfile, sys
out, sys.argv = sys.argv[1], ["sbora-diffusion", *sys.argv[2:]]
profile = cProfile.Profile()
try:
    profile.runctx("from sbora_diffusion.cli import main; main()", {}, {})
finally:
    profile.dump_stats(out)
"""

app = new_app()


@app.command()
def main(
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Of torch.")] = 2,
    tiny: Tiny = False,
    out: Out = None,
) -> None:
    """Measure, and save the numbers."""
    device = prepare("cpu")
    torch.set_num_threads(threads)
    settings = ["--set", "steps=2", "--set", "sampling_steps=1"] if tiny else []
    with tempfile.TemporaryDirectory() as name:
        stats = profiled(["train", "--concept", "dog", *settings], Path(name), threads)
    save("train", device, rows_of(stats), out, wall=True, threads=threads, tiny=tiny)


def profiled(words: Sequence[str], folder: Path, threads: int) -> pstats.Stats:
    """The profile of a command that is run in a folder."""
    path = folder / "profile"
    set_up = f"import os; os.environ['OMP_NUM_THREADS'] = '{threads}'\n"
    subprocess.run([sys.executable, "-c", set_up + RUN, str(path), *words], cwd=folder, check=True, capture_output=True)
    return pstats.Stats(str(path))


def rows_of(stats: pstats.Stats) -> list[Row]:
    """Seconds of each part, and what is left."""
    told: dict[tuple[str, str], float] = {}
    for (file, _, function), (*_, cumulative, _callers) in stats.stats.items():  # type: ignore[attr-defined]
        key = (Path(file).name, function)
        told[key] = max(told.get(key, 0.0), cumulative)
    whole = stats.total_tt  # type: ignore[attr-defined]
    found = [(what, told.get((file, function), 0.0)) for what, file, function in PARTS]
    rest = whole - sum(seconds for what, seconds in found if not what.startswith("→"))
    parts = [*found, ("everything else", rest), ("the whole", whole)]
    return [{"part": what, "s": round(seconds, 2), "%": round(100 * seconds / whole, 1)} for what, seconds in parts]


if __name__ == "__main__":
    app()
