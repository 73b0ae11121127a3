"""Many cells at once on one GPU: comparisons of methods and the retention study, from one plan.

    python eval/pooled_cells.py PLAN.toml OUT [--jobs 14] [--deadline SECONDS]

The cells are those of `sbora-diffusion compare` and eval/retention.py, in the same files; here each process computes
many of them, one after the other, and keeps its base model. Existing cells are not computed again. After the deadline
none is begun, and the tables of the comparisons are written (--deadline 0: only these). NVIDIA's MPS should run
(`nvidia-cuda-mps-control -d`): without it the processes take turns on the GPU (14 trainings of 60 steps on an H200 took
47 s with it, 50 s without). `eval/gpu/run.sh` starts it on a bare machine. A plan lists its parts in order of priority:

    [NAME]
    variants = ["lora", "sbora-fa:rank=4"]   concepts = ["dog"]   seeds = [0]   sizes = [1, 12]
    columns = "gradient"    # see chosen_columns.py
    [retention]
    schemes = ["disjoint"]   seeds = [0]   hows = ["sum"]   # no hows: training only
"""

import logging
import multiprocessing
import os
import shlex
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sbora_diffusion.evaluation.comparison.plan import Comparison

log = logging.getLogger("cells")


@dataclass(frozen=True, eq=False)
class Task:
    """A cell to compute in one of the processes."""

    key: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    is_done: Callable[[], bool]
    needs: frozenset[str] = field(default_factory=frozenset)  # keys


def run_cell(folder: Path, kind: str, key: str, columns: Path | None) -> None:
    """Compute a cell of a comparison."""
    from chosen_columns import any_rank, chosen_columns

    from sbora_diffusion.evaluation.comparison import cells as compare_cells

    if columns is None:
        return compare_cells.run_cell(folder, kind, key)
    with chosen_columns(columns, key.rsplit("/", 1)[1]) if kind == "trained" else any_rank():
        return compare_cells.run_cell(folder, kind, key)


def choose_columns(kind: str, folder: Path, path: Path) -> None:
    """Choose the columns of all concepts of a comparison."""
    from chosen_columns import choose

    from sbora_diffusion.evaluation.comparison.plan import Comparison
    from sbora_diffusion.models.base import load_base

    comparison = Comparison.load(folder)
    config = comparison.config(comparison.variants[0], comparison.seeds[0])
    choose(kind, comparison.concepts, load_base(comparison.base), config, path)


def train_retained(study: Any, scheme: str, seed: int, name: str) -> None:
    """Train a cell of the retention study."""
    import retention

    retention.train_one(study, scheme, seed, name)


def judge_retained(study: Any, scheme: str, seed: int) -> None:
    """Compute all merges and scores of the retention study's (scheme, seed)."""
    import retention_bench

    retention_bench.judge_all(study, scheme, seed)


def tasks_of(name: str, settings: dict[str, Any], out: Path) -> Iterator[Task]:
    """Yield all cells of a part of the plan."""
    return (retention_tasks if name == "retention" else comparison_tasks)(name, settings, out)


def comparison_of(settings: dict[str, Any]) -> "Comparison":
    """Return the comparison of a part of the plan."""
    from sbora_diffusion.evaluation.comparison.plan import Comparison

    return Comparison.from_dict({key: value for key, value in settings.items() if key != "columns"})


def comparison_tasks(name: str, settings: dict[str, Any], out: Path) -> Iterator[Task]:
    """Yield the cells of a comparison, variant by variant, so that a deadline leaves complete rows."""
    from sbora_diffusion.evaluation.comparison.plan import path_of, trained_as

    folder, columns, comparison = out / name, settings.get("columns"), comparison_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    comparison.save(folder)
    path, first = folder / "columns.pt" if columns else None, f"{name}/columns"
    if path:
        yield Task(first, choose_columns, (columns, folder, path), path.exists)
    cells = [("trained", key) for key in comparison.trainings()] + [("scores", key) for key in comparison.merges()]
    order = [trained_as(variant) for variant in comparison.variants]
    for kind, key in sorted(cells, key=lambda cell: order.index(trained_as(cell[1].rsplit("/", 2)[0]))):
        variant, seed, joined = key.rsplit("/", 2)
        parts = [f"{name}/trained/{trained_as(variant)}/{seed}/{part}" for part in joined.split("+")]
        needs = frozenset(parts if kind == "scores" else [first] if path else [])
        done = path_of(folder, kind, key).exists
        yield Task(f"{name}/{kind}/{key}", run_cell, (folder, kind, key, path), done, needs)


def retention_tasks(name: str, settings: dict[str, Any], out: Path) -> Iterator[Task]:
    """Yield the cells of the retention study."""
    from retention_study import Study

    lists: dict[str, Any] = {key: tuple(settings[key]) for key in ("hows", "concepts", "sizes") if key in settings}
    study = Study(folder=out / "study", results=out / "retention", overrides=settings.get("settings"), **lists)
    for seed in settings["seeds"]:
        for scheme in settings["schemes"]:
            keys = []
            for concept in study.concepts:
                keys.append(f"{name}/{scheme}/{seed}/{concept}")
                done = study.adapter_path(scheme, seed, concept).exists
                yield Task(keys[-1], train_retained, (study, scheme, seed, concept), done)
            if study.hows:
                judged = partial(_is_judged, study, scheme, seed)
                key = f"{name}/{scheme}/{seed}"
                yield Task(key, judge_retained, (study, scheme, seed), judged, frozenset(keys))


def _is_judged(study: Any, scheme: str, seed: int) -> bool:
    return not study.missing(scheme, seed)


def run_all(plan: dict[str, Any], out: Path, jobs: int, ends: float) -> None:
    """Compute cells until a time, in the order of the plan."""
    tasks = [task for name, settings in plan.items() for task in tasks_of(name, settings, out)]
    done = {task.key for task in tasks if task.is_done()}
    waiting, running = [task for task in tasks if task.key not in done], dict[Future[None], Task]()
    with new_pool(jobs) as pool:
        while time.monotonic() < ends:
            for task in [task for task in waiting if task.needs <= done][: jobs + 2 - len(running)]:
                waiting.remove(task)
                running[pool.submit(_do, task.key, task.call, task.arguments)] = task
            if not running:
                break
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                task, error = running.pop(future), future.exception()
                if error:
                    log.info("FAILED %s", error)
                else:
                    done.add(task.key)
                    log.info("%d done, %d waiting: %s", len(done), len(waiting), task.key)
        log.info("%d done, %d waiting, %d under way", len(done), len(waiting), len(running))
        for process in multiprocessing.active_children():
            process.terminate()


def new_pool(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of processes that end when this one does, even if it is killed."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    def wait_for_it() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()


def write_tables(plan: dict[str, Any], out: Path) -> None:
    """Write the tables of every comparison, from the existing cells."""
    from sbora_diffusion.evaluation.comparison.run import write_comparison

    for name, settings in plan.items():
        if name != "retention" and (out / name / "scores").exists():
            write_comparison(out / name, comparison_of(settings), shlex.join(["python", *sys.argv]))


def _do(key: str, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Compute a cell in a process of the pool; exceptions become text, as not all of them can be pickled."""
    try:
        call(*arguments)
    except Exception:
        raise RuntimeError(f"{key}\n{traceback.format_exc()[-1500:]}") from None


def main(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="TOML.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of all cells.")],
    jobs: Annotated[int, typer.Option(help="Processes.")] = 14,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="From now.")] = 1e9,
) -> None:
    """Compute all cells of a plan."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    out.mkdir(parents=True, exist_ok=True)
    parts = tomllib.loads(plan.read_text())
    run_all(parts, out, jobs, time.monotonic() + deadline)
    write_tables(parts, out)


if __name__ == "__main__":
    typer.run(main)
