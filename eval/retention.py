"""How much of K concepts is left after a merge: every way to merge × every way to choose columns, resumable.

One command: `python eval/retention.py FOLDER [--seeds 0,1,2] [--schemes disjoint,random,shared] [--jobs 2]`. Every
training is a file in FOLDER that is made once; all merges and scores of a seed stand in one file in the folder beside
--out, which is committed: another machine goes on with what is missing there. Killed and run again, it goes on. What is
there is summed up in --out: JSON, and a Markdown table and a plot beside it (matplotlib: the extra `eval`).
"""

import logging
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from retention_bench import judge_all
from retention_study import HOWS, RANK, RECIPE, SCHEMES, Study, columns_of
from retention_summary import summarise, write_summary

from sbora_diffusion.data.concept import default_roots, load_concept
from sbora_diffusion.evaluation.compare_cells import base_of_process
from sbora_diffusion.methods.registry import configure
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.training.train import run_training

log = logging.getLogger("retention")


def train_one(study: Study, scheme: str, seed: int, name: str) -> None:
    """Train a cell, or go on with it."""
    path, run = study.adapter_path(scheme, seed, name), study.folder / "runs" / f"{scheme}-{seed}" / name
    interval, basis_seed = columns_of(scheme, seed, study.concepts.index(name))
    settings = {"seed": str(seed), "basis_seed": str(basis_seed), "rank": str(RANK), "preview_every": "0"} | RECIPE
    config = configure(recipe_base(study.base), "sbora-fa", settings | dict(study.overrides or {}))
    concept, base = load_concept(name, default_roots()), base_of_process(study.base, config.model.precision)
    resume = (run / "checkpoint.pt").exists()
    run_training(concept, base, interval, config, run, save_to=path, resume=resume, overwrite=True)


def run(study: Study, schemes: Sequence[str], seeds: Sequence[int], jobs: int, out: Path) -> None:
    """All cells, seed by seed and scheme by scheme, each training a process of its own; then the summary."""
    for scheme, seed in [(scheme, seed) for seed in seeds for scheme in schemes]:
        if study.missing(scheme, seed):
            waiting = [name for name in study.concepts if not study.adapter_path(scheme, seed, name).exists()]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(partial(_in_a_process, study, scheme, seed), waiting))
            judge_all(study, scheme, seed)
        write_summary(summarise(study, schemes, seeds), out)


def _in_a_process(study: Study, scheme: str, seed: int, name: str) -> None:
    log.info("%s-%d: training %s", scheme, seed, name)
    subprocess.run([sys.executable, __file__, str(study.folder), "--train", f"{scheme}:{seed}:{name}"], check=True)


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where all cells lie.")],
    seeds: Annotated[str, typer.Option(metavar="N,…", help="Of trainings and images.")] = "0,1,2",
    schemes: Annotated[str, typer.Option(metavar="NAME,…", help="How columns are chosen.")] = ",".join(SCHEMES),
    hows: Annotated[str, typer.Option(metavar="NAME,…", help="How concepts are merged.")] = ",".join(HOWS),
    jobs: Annotated[int, typer.Option(help="Trainings at once.")] = 2,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The summary.")] = Path("eval/results/retention.json"),
    train_cell: Annotated[str, typer.Option("--train", metavar="SCHEME:SEED:NAME", help="Only this cell.")] = "",
) -> None:
    """Measure what merges keep of concepts."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    study = Study(folder=folder, results=out.with_suffix(""), hows=tuple(hows.split(",")))
    if train_cell:
        scheme, seed, name = train_cell.split(":")
        return train_one(study, scheme, int(seed), name)
    return run(study, schemes.split(","), [int(seed) for seed in seeds.split(",")], jobs, out)


if __name__ == "__main__":
    typer.run(main)
