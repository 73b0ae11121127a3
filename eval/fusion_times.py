"""The closed form of gradient fusion against LBFGS, in turns on one core: seconds and objective of each.

One command: `python eval/fusion_times.py FOLDER [--scheme disjoint] [--seed 1]`, on trainings that the retention study
(`eval/retention.py`) has left in FOLDER. Minutes, nearly all of them LBFGS.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from retention_bench import Bench
from retention_study import SIZES, Study

from sbora_diffusion.training.checkpoint import versions
from sbora_diffusion.utils.files import write_atomically

SOLVES = 4  # of the closed form before LBFGS, and after it


def compared(bench: Bench, size: int) -> dict[str, float]:
    """Of the first `size` concepts: seconds without the drawing of inputs, objectives as shares of that of no delta."""
    names = bench.study.groups(size)[0]
    closed = [bench.merged("full", names)[1] for _ in range(1 + SOLVES)][1:]
    lbfgs = bench.merged("lbfgs", names)[1]
    closed += [bench.merged("full", names)[1] for _ in range(SOLVES)]
    seconds = statistics.median(each["seconds"] for each in closed)
    return {
        "concepts": size,
        "closed form, s": round(seconds, 3),
        "LBFGS, s": round(lbfgs["seconds"], 1),
        "times faster": round(lbfgs["seconds"] / seconds, 1),
        "objective, closed form": round(closed[0]["objective"], 4),
        "objective, LBFGS": round(lbfgs["objective"], 4),
    }


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of eval/retention.py.")],
    scheme: Annotated[str, typer.Option(metavar="NAME", help="How columns were chosen.")] = "disjoint",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the trainings.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE")] = Path("eval/results/fusion-times.json"),
) -> None:
    """Measure, and save the numbers."""
    torch.set_num_threads(1)
    bench = Bench(Study(folder=folder), scheme, seed)
    rows = [compared(bench, size) for size in SIZES]
    command = f"python eval/fusion_times.py FOLDER --scheme {scheme} --seed {seed}"
    told = {"command": command, "solves": 2 * SOLVES, "versions": versions(), "rows": rows}
    write_atomically(out, (json.dumps(told, indent=1) + "\n").encode())
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
