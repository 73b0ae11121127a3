"""The cells of a comparison of methods: a training or a judged merge each, one process, a file that is made once."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from sbora_diffusion.adapter.basis import Interval
from sbora_diffusion.adapter.file import Adapter
from sbora_diffusion.diffusion.base import Base, load_base
from sbora_diffusion.diffusion.concept import default_roots, known_concepts, load_concept
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.generate import applied, generate
from sbora_diffusion.diffusion.loading import recipe_base
from sbora_diffusion.diffusion.method_merge import merge_by_method
from sbora_diffusion.diffusion.sheet import sheet
from sbora_diffusion.diffusion.train import train
from sbora_diffusion.errors import SboraError
from sbora_diffusion.evaluation.encoders import load_encoder
from sbora_diffusion.evaluation.scores import Judge, instruct, reference_pictures, score
from sbora_diffusion.evaluation.series import merged_token
from sbora_diffusion.evaluation.suite import load_suite
from sbora_diffusion.files import write_atomically
from sbora_diffusion.methods import find_method

BATCH = 20  # pictures at once


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: the same base, pictures, prompts and steps for every variant, or those of its own settings."""

    variants: tuple[str, ...]  # "lora" or "lora:rank=4,learning_rate=1e-3"; "sbora-fa:merge=fuse" merges in that way
    concepts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (1,)  # concepts merged at once
    base: str = "emoji64"
    suite: str = "emoji64"
    judge: str = "emoji-clip"
    settings: dict[str, str] = field(default_factory=dict)  # of all recipes

    @classmethod
    def load(cls, folder: Path) -> "Comparison":
        """Inverse of `save`."""
        said: dict[str, Any] = json.loads((folder / "comparison.json").read_bytes())
        lists = {key: tuple(value) for key, value in said.items() if isinstance(value, list)}
        return cls(**{**said, **lists})

    def save(self, folder: Path) -> None:
        """Write it down; SboraError if cells of other conditions lie in the folder (more cells may be added)."""
        if (folder / "comparison.json").exists():
            before = asdict(Comparison.load(folder))
            for key in ("base", "suite", "judge", "settings", "concepts"):
                if before[key] != getattr(self, key):
                    raise SboraError(f"{folder} holds a comparison of {key} {before[key]}", "choose another --out")
        write_atomically(folder / "comparison.json", json.dumps(asdict(self), indent=1).encode())

    def config(self, variant: str, seed: int) -> TrainConfig:
        """The recipe of a variant, with the common settings and its own over it."""
        method, own = _parts_of(trained_as(variant))
        settings = self.settings | own | {"seed": str(seed), "preview_every": "0"}
        return TrainConfig.from_recipe(recipe_base(self.base), method, settings)

    def groups(self, size: int) -> list[tuple[str, ...]]:
        """Neighbours, so that every concept is in one merge of each size."""
        return [self.concepts[start : start + size] for start in range(0, len(self.concepts), size)]

    def trainings(self) -> Iterator[str]:
        """Keys of the cells to train."""
        variants = dict.fromkeys(map(trained_as, self.variants))
        yield from (f"{v}/{seed}/{name}" for seed in self.seeds for v in variants for name in self.concepts)

    def merges(self) -> Iterator[str]:
        """Keys of the cells to judge, single concepts (size 1) first."""
        for size in self.sizes:
            for seed in self.seeds:
                for variant in self.variants:
                    yield from (f"{variant}/{seed}/{'+'.join(names)}" for names in self.groups(size))


def _parts_of(variant: str) -> tuple[str, dict[str, str]]:
    """Its method, and what it sets."""
    method, _, own = variant.partition(":")
    pairs = [pair.partition("=") for pair in own.split(",") if pair]
    if any(not equals for _, equals, _ in pairs):
        raise SboraError(f"got {variant!r}, expected method or method:key=value,key=value")
    return method, {key: value for key, _, value in pairs}


def trained_as(variant: str) -> str:
    """The variant that trains its adapters: itself, but for how it merges."""
    method, own = _parts_of(variant)
    settings = ",".join(f"{key}={value}" for key, value in own.items() if key != "merge")
    return f"{method}:{settings}" if settings else method


def path_of(folder: Path, kind: str, key: str) -> Path:
    """Where a cell's result lies; kind is "trained" or "scores"."""
    return folder / kind / f"{key}.json"


def run_cell(folder: Path, kind: str, key: str) -> None:
    """Make a cell, or go on with it."""
    comparison = Comparison.load(folder)
    variant, seed, names = key.rsplit("/", 2)
    made = _train if kind == "trained" else _judge
    told = made(folder, comparison, variant, int(seed), names)
    write_atomically(path_of(folder, kind, key), json.dumps(told).encode())


def _adapter_path(folder: Path, variant: str, seed: int, name: str) -> Path:
    return folder / "adapters" / trained_as(variant) / str(seed) / f"{name}.safetensors"


def _train(folder: Path, comparison: Comparison, variant: str, seed: int, name: str) -> dict[str, Any]:
    """Train one concept: number of trained parameters, file size, seconds (of what was not resumed), peak memory."""
    config, run = comparison.config(variant, seed), folder / "runs" / variant / str(seed) / name
    start = comparison.concepts.index(name) * config.rank
    interval = Interval(start, config.rank) if find_method(config.method).owns_interval else None
    concept, base = load_concept(name, default_roots()), base_of_process(comparison.base, config.precision)
    path, adapter = _adapter_path(folder, variant, seed, name), None
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    began = time.perf_counter()
    for step in train(concept, base, interval, config, run, resume=(run / "checkpoint.pt").exists()):
        if step.adapter:
            adapter = step.adapter
            adapter.save(path, True)
    assert adapter is not None
    return {
        "seconds": time.perf_counter() - began,
        "bytes": path.stat().st_size,
        "parameters": num_trained(adapter),
        "peak_bytes": peak_bytes(base.device),
    }


def num_trained(adapter: Adapter) -> int:
    """Trained numbers: those of the file, without Orthogonal Adaptation's frozen factor and the frozen noun."""
    count = adapter.num_weights() + sum(rows.numel() for rows in adapter.tokens.values())
    method = find_method(adapter.spec.method_name)
    if method.kind == "orthogonal":
        count -= sum(dense.down.numel() for dense in adapter.dense.values() if dense.down is not None)
    if method.fixed_noun and adapter.spec.recipe.get("token_vectors", 1) > 1:
        count -= sum(rows.shape[1] for rows in adapter.tokens.values()) * max(1, adapter.spec.embedding_layers)
    return count


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held on its GPU, or without one at all (now, where no system tells)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return psutil.Process().memory_info().rss


def _judge(folder: Path, comparison: Comparison, variant: str, seed: int, joined: str) -> dict[str, Any]:
    """Draw and judge each concept of a merge: name -> metric -> a number a prompt."""
    base = base_of_process(comparison.base, comparison.config(variant, seed).precision)
    judge = _judge_of(comparison.judge)
    parts = [Adapter.load(_adapter_path(folder, variant, seed, name)) for name in joined.split("+")]
    merged = parts[0] if len(parts) == 1 else merge_by_method(base, parts, how=_parts_of(variant)[1].get("merge", ""))
    suite, told, rows = load_suite(comparison.suite), {}, []
    with applied(base, [merged]):
        for part in parts:
            token = merged_token(merged, part)
            prompts = suite.bind([token])
            pictures = _pictures(base, prompts, seed)
            nouns: Mapping[str, str] = {token: merged.spec.tokens[token]}
            found = score(pictures, prompts, judge, nouns, [part.spec.name])[part.spec.name]
            told[part.spec.name] = {metric: [round(x, 5) for x in values.tolist()] for metric, values in found.items()}
            rows.append((f"{part.spec.name} by {variant}", list(zip(prompts[:8], pictures[:8], strict=True))))
    picture = path_of(folder, "scores", f"{variant}/{seed}/{joined}").with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(picture)
    return told


@lru_cache(maxsize=1)
def base_of_process(name: str, precision: str) -> Base:
    """Loaded once a process: trainings and judgements leave it as it was."""
    return load_base(name, precision)


@lru_cache(maxsize=1)
def _judge_of(encoder: str) -> Judge:
    known = [load_concept(name, default_roots()) for name in known_concepts(default_roots())]
    return instruct(load_encoder(encoder), reference_pictures(known), None)


def _pictures(base: Base, prompts: Sequence[str], seed: int) -> list[Any]:
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return [picture for batch in batches for picture in generate(base, batch, seeds=[seed] * len(batch))]
