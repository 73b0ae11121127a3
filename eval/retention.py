"""How much of K concepts is left after a merge: every way to merge × every way to choose columns, resumable.

One command: `python eval/retention.py FOLDER [--seeds 0,1,2] [--schemes disjoint,random,shared] [--jobs 2]`. Every
training, merge and score is a file in FOLDER that is made once; killed and run again, it goes on. What is there is
summed up in --out: JSON, and a Markdown table beside it.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from sbora_diffusion.adapter.basis import Interval
from sbora_diffusion.adapter.file import Adapter, Factor, write_atomically
from sbora_diffusion.adapter.fuse import RIDGE, full_support, fuse, objective
from sbora_diffusion.adapter.lbfgs import STEPS, gradient_fusion
from sbora_diffusion.adapter.merge import merge, put_together
from sbora_diffusion.diffusion.base import Base, load_base
from sbora_diffusion.diffusion.concept import Concept, default_roots, known_concepts, load_concept
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.generate import applied, generate
from sbora_diffusion.diffusion.moments import DrawnInputs
from sbora_diffusion.diffusion.run_folder import versions
from sbora_diffusion.diffusion.sheet import sheet
from sbora_diffusion.diffusion.train import train
from sbora_diffusion.evaluation.alignment import bootstrap_interval
from sbora_diffusion.evaluation.encoders import load_encoder
from sbora_diffusion.evaluation.scores import Judge, instruct, reference_pictures, score
from sbora_diffusion.evaluation.suite import load_suite

log = logging.getLogger("retention")

CONCEPTS = ("dog", "penguin", "octopus", "cat", "horse", "rooster")
CONCEPTS += ("dragon", "monkey", "elephant", "tiger", "snail", "pumpkin")
SCHEMES = ("disjoint", "random", "shared")
HOWS = ("sum", "fuse", "full", "lbfgs")
SIZES = (3, 6, 12)
RANK = 8
PRIOR_WEIGHT = 1.0
METRICS = ("text_mos", "image", "success")
BATCH = 10


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, on which base and by which judge, and where its files lie."""

    folder: Path
    base: str = "emoji64"
    judge: str = "emoji-clip"
    suite: str = "emoji64"
    concepts: tuple[str, ...] = CONCEPTS
    sizes: tuple[int, ...] = SIZES
    overrides: Mapping[str, str] | None = None  # of the recipe

    def adapter_path(self, scheme: str, seed: int, name: str) -> Path:
        return self.folder / "adapters" / f"{scheme}-{seed}" / f"{name}.safetensors"

    def cell_path(self, scheme: str, seed: int, how: str, size: int, name: str) -> Path:
        """Scores of one concept's pictures; `how` is "single" for size 1."""
        return self.folder / "scores" / f"{scheme}-{seed}" / f"{how}-{size}-{name}.json"

    def merge_path(self, scheme: str, seed: int, how: str, names: Sequence[str]) -> Path:
        """Times and objective of one merge."""
        return self.folder / "merges" / f"{scheme}-{seed}" / f"{how}-{'+'.join(names)}.json"

    def groups(self, size: int) -> list[tuple[str, ...]]:
        """Neighbours, so that every concept is in one merge of each size."""
        return [self.concepts[start : start + size] for start in range(0, len(self.concepts), size)]


def columns_of(scheme: str, seed: int, number: int) -> tuple[Interval, int]:
    """The interval and the basis seed of a concept: its own columns, columns by chance, or everybody's."""
    if scheme == "disjoint":
        return Interval(number * RANK, RANK), 0
    return Interval(0, RANK), 0 if scheme == "shared" else 1000 * (seed + 1) + number


def train_one(study: Study, scheme: str, seed: int, name: str) -> None:
    """Train a cell, or go on with it."""
    path, run = study.adapter_path(scheme, seed, name), study.folder / "runs" / f"{scheme}-{seed}" / name
    interval, basis_seed = columns_of(scheme, seed, study.concepts.index(name))
    settings = {"seed": str(seed), "basis_seed": str(basis_seed), "rank": str(RANK), "preview_every": "0"}
    config = TrainConfig.from_recipe(study.base, "sbora-fa", settings | dict(study.overrides or {}))
    concept, base = load_concept(name, default_roots()), load_base(study.base)
    for step in train(concept, base, interval, config, run, resume=(run / "checkpoint.pt").exists()):
        if step.adapter:
            step.adapter.save(path, True)


class Bench:
    """The loaded base model and judge, and what was computed for one (scheme, seed)."""

    def __init__(self, study: Study, scheme: str, seed: int) -> None:
        self.study, self.scheme, self.seed = study, scheme, seed
        self.base: Base = load_base(study.base)
        self.adapters = {name: self._load(name) for name in study.concepts}
        known = {name: load_concept(name, default_roots()) for name in known_concepts(default_roots())}
        self.concepts: dict[str, Concept] = known
        self.judge: Judge = instruct(load_encoder(study.judge), reference_pictures(known.values()), None)
        self.suite = load_suite(study.suite)
        self._inputs = DrawnInputs(self.base, list(self.adapters.values()))
        self._moments: dict[str | None, dict[str, Tensor]] = {}

    def _load(self, name: str) -> Adapter:
        adapter = Adapter.load(self.study.adapter_path(self.scheme, self.seed, name))
        # merges want one basis seed; what is merged are the factors, and these say which columns they are
        return replace(adapter, spec=replace(adapter.spec, seed=0))

    def moments(self, adapter: Adapter | None) -> dict[str, Tensor]:
        """Of all columns, in float64; each drawn once."""
        name = adapter.spec.name if adapter else None
        if name not in self._moments:
            every = {key: torch.arange(shape[1]) for key, shape in self.base.layer_shapes.items()}
            self._moments[name] = self._inputs(adapter, every)
        return self._moments[name]

    def inputs(self, adapter: Adapter | None, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `fuse` asks for."""
        return {key: self.moments(adapter)[key][index][:, index] for key, index in columns.items()}

    def merged(self, how: str, names: Sequence[str]) -> Adapter:
        """A merge; its time (without the drawing) and its objective are written down."""
        adapters, weights = [self.adapters[name] for name in sorted(names)], [1.0] * len(names)
        for adapter in (*adapters, None):
            self.moments(adapter)
        began = time.perf_counter()
        if how == "sum":
            result = merge(adapters, weights, "sum")
        elif how == "fuse":
            result = fuse(adapters, weights, self.inputs, prior_weight=PRIOR_WEIGHT)
        else:
            factors = {key: Factor(torch.arange(shape[1]), self._dense(how, key, adapters).float())
                       for key, shape in self.base.layer_shapes.items()}  # fmt: skip
            result = put_together(adapters, weights, factors, {"how": how})
        seconds = time.perf_counter() - began
        own, reached = self._objectives(result, adapters)
        told = {"seconds": seconds, "objective": reached, "objective of nothing": own}
        path = self.study.merge_path(self.scheme, self.seed, how, names)
        write_atomically(path, json.dumps(told).encode())
        return result

    def _dense(self, how: str, key: str, adapters: Sequence[Adapter]) -> Tensor:
        deltas = [self._delta(adapter, key) for adapter in adapters]
        moments, prior = [self.moments(adapter)[key] for adapter in adapters], self.moments(None)[key]
        if how == "full":
            return full_support(deltas, moments, prior, prior_weight=PRIOR_WEIGHT, ridge=RIDGE)
        steps = STEPS[key.partition(".")[0]]
        return gradient_fusion(deltas, moments, prior, prior_weight=PRIOR_WEIGHT, steps=steps)

    def _delta(self, adapter: Adapter, key: str) -> Tensor:
        """(out, in) float64."""
        delta, factor = torch.zeros(self.base.layer_shapes[key], dtype=torch.float64), adapter.factors[key]
        return delta.index_copy_(1, factor.index, factor.weight.double())

    def _objectives(self, result: Adapter, adapters: Sequence[Adapter]) -> tuple[float, float]:
        """Mean over the layers of the objective of no delta at all, and of the result as a share of that."""
        nothing, shares = [], []
        for key in self.base.layer_shapes:
            deltas = [self._delta(adapter, key) for adapter in adapters]
            moments, prior = [self.moments(adapter)[key] for adapter in adapters], self.moments(None)[key]
            nothing.append(objective(torch.zeros_like(deltas[0]), deltas, moments, prior, PRIOR_WEIGHT))
            reached = objective(self._delta(result, key), deltas, moments, prior, PRIOR_WEIGHT)
            shares.append(reached / nothing[-1])
        return torch.stack(nothing).mean().item(), torch.stack(shares).mean().item()

    def score(self, adapter: Adapter, how: str, size: int, names: Sequence[str]) -> None:
        """Draw and judge each of these concepts with what is given, and write down every number."""
        rows = []
        with applied(self.base, [adapter]):
            for name in names:
                concept = self.concepts[name]
                prompts = self.suite.bind([concept.token])
                pictures = []
                for start in range(0, len(prompts), BATCH):
                    texts = prompts[start : start + BATCH]
                    pictures += generate(self.base, texts, seeds=[self.seed] * len(texts))
                found = score(pictures, prompts, self.judge, {concept.token: concept.class_noun}, [name])[name]
                told = {metric: [round(x, 5) for x in values.tolist()] for metric, values in found.items()}
                path = self.study.cell_path(self.scheme, self.seed, how, size, name)
                write_atomically(path, json.dumps(told).encode())
                rows.append((f"<{name}>, {how} of {size}", [("", picture) for picture in pictures[:10]]))
        page = self.study.folder / "sheets" / f"{self.scheme}-{self.seed}-{how}-{size}-{names[0]}.png"
        page.parent.mkdir(parents=True, exist_ok=True)
        sheet(rows, cell=64).save(page)


def judge_all(study: Study, scheme: str, seed: int) -> None:
    """Every merge and score of one (scheme, seed) that is not there yet."""
    bench: Bench | None = None
    for how, size, names in planned(study):
        if all(study.cell_path(scheme, seed, how, size, name).exists() for name in names):
            continue
        bench = bench or Bench(study, scheme, seed)
        log.info("%s-%d: %s of %s", scheme, seed, how, "+".join(names))
        bench.score(bench.adapters[names[0]] if how == "single" else bench.merged(how, names), how, size, names)


def planned(study: Study) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """(how, size, names): every concept alone, then every merge."""
    yield from (("single", 1, (name,)) for name in study.concepts)
    yield from ((how, size, names) for size in study.sizes for how in HOWS for names in study.groups(size))


def summarise(study: Study, schemes: Sequence[str], seeds: Sequence[int]) -> dict:
    """Means of what is there, with bootstrap 95 % intervals over (concept, seed) and prompts; what is missing."""
    rows, missing = [], 0
    for scheme in schemes:
        for how, size in dict.fromkeys((how, size) for how, size, _ in planned(study)):
            cells = {(seed, name): _read(study.cell_path(scheme, seed, how, size, name))
                     for seed in seeds for name in study.concepts}  # fmt: skip
            singles = {(seed, name): _read(study.cell_path(scheme, seed, "single", 1, name)) for seed, name in cells}
            both = [(cells[key], singles[key]) for key in cells if cells[key] and singles[key]]
            missing += len(cells) - len(both)
            if not both:
                continue
            row: dict = {"scheme": scheme, "how": how, "size": size, "cells": len(both)}
            for metric in METRICS:
                after, before = (torch.tensor([pair[i][metric] for pair in both]).T for i in (0, 1))
                row[metric] = _estimate(after)
                row[f"{metric} change"] = _estimate(after - before)
                row[f"{metric} retention"] = (after.mean() / before.mean()).item()
            merges = [
                _read(study.merge_path(scheme, seed, how, names)) for seed in seeds for names in study.groups(size)
            ]
            done = [each for each in merges if each]
            for key in ("seconds", "objective"):
                row[key] = sum(each[key] for each in done) / len(done) if done else None
            rows.append(row)
    return {"command": "python " + " ".join(sys.argv), "base": study.base, "judge": study.judge, "suite": study.suite,
            "concepts": study.concepts, "seeds": list(seeds), "missing cells": missing, "versions": versions(),
            "rows": rows}  # fmt: skip


def _read(path: Path) -> dict:
    return json.loads(path.read_bytes()) if path.exists() else {}


def _estimate(values: Tensor) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"mean": round(values.mean().item(), 4), "low": round(low, 4), "high": round(high, 4)}


def table(summary: Mapping) -> str:
    """The summary's rows in Markdown."""
    head = ["columns", "merge", "K", "n", "text", "image", "success", "image kept", "success kept", "objective", "s"]
    lines = [head, ["---"] * len(head)]
    for row in summary["rows"]:
        scores = [f"{row[m]['mean']:.3f} [{row[m]['low']:.3f}, {row[m]['high']:.3f}]" for m in METRICS]
        kept = [f"{row[f'{m} retention']:.1%}" for m in ("image", "success")]
        merged = ["–" if row[key] is None else f"{row[key]:.3g}" for key in ("objective", "seconds")]
        lines.append([row["scheme"], row["how"], str(row["size"]), str(row["cells"]), *scores, *kept, *merged])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def run(study: Study, schemes: Sequence[str], seeds: Sequence[int], jobs: int, out: Path) -> None:
    """All cells, scheme by scheme and seed by seed, each training a process of its own; then the summary."""
    for scheme, seed in [(scheme, seed) for scheme in schemes for seed in seeds]:
        waiting = [name for name in study.concepts if not study.adapter_path(scheme, seed, name).exists()]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(partial(_in_a_process, study, scheme, seed), waiting))
        judge_all(study, scheme, seed)
        write_summary(summarise(study, schemes, seeds), out)


def _in_a_process(study: Study, scheme: str, seed: int, name: str) -> None:
    log.info("%s-%d: training %s", scheme, seed, name)
    subprocess.run([sys.executable, __file__, str(study.folder), "--train", f"{scheme}:{seed}:{name}"], check=True)


def write_summary(summary: Mapping, out: Path) -> None:
    write_atomically(out, (json.dumps(summary, indent=1) + "\n").encode())
    write_atomically(out.with_suffix(".md"), table(summary).encode())
    log.info("%s; %d cells are missing", out, summary["missing cells"])


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where all cells lie.")],
    seeds: Annotated[str, typer.Option(metavar="N,…", help="Of trainings and pictures.")] = "0,1,2",
    schemes: Annotated[str, typer.Option(metavar="NAME,…", help="How columns are chosen.")] = ",".join(SCHEMES),
    jobs: Annotated[int, typer.Option(help="Trainings at once.")] = 2,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The summary.")] = Path("eval/results/retention.json"),
    train_cell: Annotated[str, typer.Option("--train", metavar="SCHEME:SEED:NAME", help="Only this cell.")] = "",
) -> None:
    """Measure what merges keep of concepts."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    study = Study(folder=folder)
    if train_cell:
        scheme, seed, name = train_cell.split(":")
        return train_one(study, scheme, int(seed), name)
    return run(study, schemes.split(","), [int(seed) for seed in seeds.split(",")], jobs, out)


if __name__ == "__main__":
    typer.run(main)
