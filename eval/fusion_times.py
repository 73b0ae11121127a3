"""The closed form of gradient fusion against LBFGS, alternately on one core: seconds and objective of each.

    python eval/fusion_times.py FOLDER [--scheme disjoint] [--seed 1]

FOLDER is that of the retention study (eval/retention.py). Takes minutes, most of them for LBFGS.
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
from sbora_diffusion.utils.files import write_file

SOLVES = 4  # of the closed form before LBFGS, and after it


def compared(bench: Bench, size: int) -> dict[str, float]:
    """Return seconds (without sampling) and objectives (relative to no delta) of a merge of `size` concepts."""
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
    scheme: Annotated[str, typer.Option(metavar="NAME", help="How columns are chosen.")] = "disjoint",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the trainings.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE")] = Path("eval/results/fusion-times.json"),
) -> None:
    """Measure, and save the results."""
    torch.set_num_threads(1)
    bench = Bench(Study(folder=folder), scheme, seed)
    rows = [compared(bench, size) for size in SIZES]
    command = f"python eval/fusion_times.py FOLDER --scheme {scheme} --seed {seed}"
    content = {"command": command, "solves": 2 * SOLVES, "versions": versions(), "rows": rows}
    write_file(out, (json.dumps(content, indent=1) + "\n").encode(), overwrite=True)
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
