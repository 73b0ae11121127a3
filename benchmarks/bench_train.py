"""(g) Where the time of a whole `sbora-diffusion train --concept dog` goes, from the start of the process to its end.

    python benchmarks/bench_train.py [--python FILE] [--rounds 5] [--threads 2] [--tiny] [--out FILE]

The first rows are the plain command, repeated: median, minimum and maximum. The others are one training under Python's
profiler, whose overhead is small here, because nearly all time is spent in few calls of torch; imports, which are pure
Python, take twice as long under it. Rows with an arrow are parts of the row above them. Seconds are wall-clock time, so
run it on an idle machine, and pass --python with an environment made by the README's first command: installed packages
of the extras are imported, too.
"""

import importlib
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_common import Out, Rounds, Row, Tiny, new_app, prepare, save

from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data import latents
from sbora_diffusion.data.latents import prior_latents
from sbora_diffusion.models.loading import load_pipeline
from sbora_diffusion.training.checkpoint import RunFolder
from sbora_diffusion.training.optim import Precision
from sbora_diffusion.training.run import Preview
from sbora_diffusion.training.trainer import Trainer

PARTS: dict[str, Callable[..., Any]] = {
    "import packages": importlib._bootstrap._find_and_load,  # type: ignore[attr-defined]
    "load the base model": load_pipeline,
    "encode the images": latents.encode,
    "load or generate the prior images": prior_latents,
    "predict what is to be preserved": latents.base_predictions,
    "generate previews, before and after": Preview._images,
    "steps": Trainer.train_step,
    "→ forward": Trainer._predict,
    "→ backward": Precision.backward,
    "→ optimiser": Precision.step,
    "save checkpoints": RunFolder.save,
    "save the concept": Adapter.save,
}
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
    """Measure the command, and save the results."""
    device = prepare("cpu")
    torch.set_num_threads(threads)
    words = ["train", "--concept", "dog", *(["--set", "steps=2", "--set", "sampling_steps=1"] if tiny else [])]
    python = str(Path(python).absolute())  # a link is not resolved: its target is outside of the environment
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    seconds = [run([python, "-c", RUN, *words], environment) for _ in range(rounds)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "profile"
        run([python, "-c", PROFILED, str(path), *words], environment)
        rows = plain_rows(seconds) + rows_of(pstats.Stats(str(path)))
    save("train", device, rows, out, wall=True, python=python, rounds=rounds, threads=threads, tiny=tiny)


def run(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run a command in an empty folder and return the wall-clock seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        return time.perf_counter() - began


def plain_rows(seconds: Sequence[float]) -> list[Row]:
    """Summarise the runs without a profiler."""
    summary = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return [{"part": f"the command, {what} of {len(seconds)}", "s": round(s, 2)} for what, s in summary.items()]


def rows_of(stats: pstats.Stats) -> list[Row]:
    """Return the seconds of each part, and of everything else."""
    total = stats.total_tt  # type: ignore[attr-defined]
    found = [(part, seconds) for part, (_, seconds) in calls_and_seconds(stats).items()]
    rest = total - sum(seconds for part, seconds in found if not part.startswith("→"))
    rows = [*found, ("everything else", rest), ("the whole, under the profiler", total)]
    return [{"part": part, "s": round(seconds, 2), "%": round(100 * seconds / total, 1)} for part, seconds in rows]


def calls_and_seconds(stats: pstats.Stats) -> dict[str, tuple[int, float]]:
    """Return how often each part was called, and its cumulative seconds; 0 and 0 if it was never called."""
    profiled: dict[tuple[str, str], tuple[int, float]] = {}
    for (file, _, function), (_, calls, _, seconds, _) in stats.stats.items():  # type: ignore[attr-defined]
        key = (_module_path(file), function)
        before = profiled.get(key, (0, 0.0))
        profiled[key] = (before[0] + calls, max(before[1], seconds))
    codes = {part: function.__code__ for part, function in PARTS.items()}
    return {
        part: profiled.get((_module_path(code.co_filename), code.co_name), (0, 0.0)) for part, code in codes.items()
    }


def _module_path(file: str) -> str:
    """Return a path from the package on: with --python, the package may be installed elsewhere."""
    return file[max(0, file.rfind(f"sbora_diffusion{os.sep}")) :]


if __name__ == "__main__":
    app()
