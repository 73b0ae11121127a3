"""The cells of a comparison of methods: a training or a judged merge each, one process, a file that is made once."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import default_roots, known_concepts, load_concept
from sbora_diffusion.evaluation.comparison import Comparison, parts_of, path_of, trained_as
from sbora_diffusion.evaluation.encoders import load_encoder
from sbora_diffusion.evaluation.scores import Judge, instruct, reference_images, score
from sbora_diffusion.evaluation.series import merged_token
from sbora_diffusion.evaluation.suite import load_suite
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.methods.merging import merge_by_method
from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.training.checkpoint import CHECKPOINT
from sbora_diffusion.training.train import run_training
from sbora_diffusion.utils.files import write_atomically

BATCH = 20  # images at once


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
    start = comparison.concepts.index(name) * config.method.rank
    interval = Interval(start, config.method.rank) if find_method(config.method.name).owns_interval else None
    concept, base = load_concept(name, default_roots()), base_of_process(comparison.base, config.model.precision)
    path = _adapter_path(folder, variant, seed, name)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    began = time.perf_counter()
    resume = (run / CHECKPOINT).exists()
    adapter = run_training(concept, base, interval, config, run, save_to=path, resume=resume, overwrite=True).adapter
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
    base = base_of_process(comparison.base, comparison.config(variant, seed).model.precision)
    judge = _judge_of(comparison.judge)
    parts = [Adapter.load(_adapter_path(folder, variant, seed, name)) for name in joined.split("+")]
    merged = parts[0] if len(parts) == 1 else merge_by_method(base, parts, how=parts_of(variant)[1].get("merge", ""))
    suite, told, rows = load_suite(comparison.suite), {}, []
    with applied(base, [merged]):
        for part in parts:
            token = merged_token(merged, part)
            prompts = suite.bind([token])
            images = _images(base, prompts, seed)
            nouns: Mapping[str, str] = {token: merged.spec.tokens[token]}
            found = score(images, prompts, judge, nouns, [part.spec.name])[part.spec.name]
            told[part.spec.name] = {metric: [round(x, 5) for x in values.tolist()] for metric, values in found.items()}
            rows.append((f"{part.spec.name} by {variant}", list(zip(prompts[:8], images[:8], strict=True))))
    image = path_of(folder, "scores", f"{variant}/{seed}/{joined}").with_suffix(".png")
    image.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(image)
    return told


@lru_cache(maxsize=1)
def base_of_process(name: str, precision: str) -> Base:
    """Loaded once a process: trainings and judgements leave it as it was."""
    return load_base(name, precision)


@lru_cache(maxsize=1)
def _judge_of(encoder: str) -> Judge:
    known = [load_concept(name, default_roots()) for name in known_concepts(default_roots())]
    return instruct(load_encoder(encoder), reference_images(known), None)


def _images(base: Base, prompts: Sequence[str], seed: int) -> list[Any]:
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return [image for batch in batches for image in generate(base, batch, seeds=[seed] * len(batch))]
