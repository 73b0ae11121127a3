"""The cells of a comparison: a training or a scored merge each, in a process of its own, computed once.

`python -m sbora_diffusion.evaluation.comparison.cells FOLDER KIND KEY` computes one cell.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.data.concept import Concept, default_roots, load_concept
from sbora_diffusion.evaluation.comparison.plan import Comparison, parts_of, path_of, trained_as
from sbora_diffusion.evaluation.images import all_concepts, merged_token, reference_images
from sbora_diffusion.evaluation.judges import load_judge
from sbora_diffusion.evaluation.judges.base import Scorer, prepare
from sbora_diffusion.evaluation.suites import load_suite
from sbora_diffusion.inference.generate import applied, generate
from sbora_diffusion.inference.image_grid import sheet
from sbora_diffusion.methods.merging import merge
from sbora_diffusion.methods.registry import find_method
from sbora_diffusion.models.base import Base, load_base
from sbora_diffusion.recipes.config import TrainConfig
from sbora_diffusion.training.checkpoint import CHECKPOINT
from sbora_diffusion.training.run import run_training
from sbora_diffusion.utils.files import write_file

BATCH = 20  # images generated at once


def run_cell(folder: Path, kind: str, key: str) -> None:
    """Compute a cell, or resume it; `kind` and `key` as of `plan.path_of`."""
    comparison = Comparison.load(folder)
    variant, seed, names = key.rsplit("/", 2)
    compute = _train if kind == "trained" else _score
    found = compute(folder, comparison, variant, int(seed), names)
    write_file(path_of(folder, kind, key), json.dumps(found).encode(), overwrite=True)


def train_once(
    concept: Concept, base: Base, interval: Interval | None, config: TrainConfig, run: Path, path: Path
) -> Adapter:
    """Train a concept, or resume its training in the folder `run`, and save the adapter at `path`."""
    resume = (run / CHECKPOINT).exists()
    return run_training(concept, base, interval, config, run, save_to=path, resume=resume, overwrite=True).adapter


def generate_all(base: Base, prompts: Sequence[str], seed: int, steps: int | None = None) -> list[Image.Image]:
    """Generate an image of each prompt, all with the same seed, in batches; `steps` None: the base model's usual."""
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return [image for batch in batches for image in generate(base, batch, seeds=[seed] * len(batch), steps=steps)]


@lru_cache(maxsize=1)
def base_of_process(name: str, precision: str) -> Base:
    """Load a base model once in a process: trainings and merges leave it unchanged."""
    return load_base(name, precision)


def peak_bytes(device: torch.device) -> int:
    """Return this process's peak memory on its GPU, or its peak resident memory (the current one if not on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return psutil.Process().memory_info().rss


def _train(folder: Path, comparison: Comparison, variant: str, seed: int, name: str) -> dict[str, Any]:
    """Return seconds (of this process), file size, number of trained parameters and peak memory of a training."""
    config, path = comparison.config(variant, seed), _adapter_path(folder, variant, seed, name)
    start = comparison.concepts.index(name) * config.method.rank
    interval = Interval(start, config.method.rank) if find_method(config.method.name).owns_interval else None
    concept, base = load_concept(name, default_roots()), base_of_process(comparison.base, config.model.precision)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    began = time.perf_counter()
    train_once(concept, base, interval, config, folder / "runs" / variant / str(seed) / name, path)
    return {
        "seconds": time.perf_counter() - began,
        "bytes": path.stat().st_size,
        "parameters": find_method(config.method.name).num_parameters(base, config),
        "peak_bytes": peak_bytes(base.device),
    }


def _score(folder: Path, comparison: Comparison, variant: str, seed: int, joined: str) -> dict[str, Any]:
    """Return the scores of each concept of a merge: name -> metric -> one score for each prompt."""
    base = base_of_process(comparison.base, comparison.config(variant, seed).model.precision)
    scorer, suite = _scorer_of_process(comparison.judge), load_suite(comparison.suite)
    parts = [Adapter.load(_adapter_path(folder, variant, seed, name)) for name in joined.split("+")]
    merged = parts[0] if len(parts) == 1 else merge(parts, how=parts_of(variant)[1].get("merge", ""), base=base)
    found, rows = {}, []
    with applied(base, [merged]):
        for name, token in ((part.spec.name, merged_token(merged, part)) for part in parts):
            prompts = suite.bind([token])
            images = generate_all(base, prompts, seed)
            scores = scorer(images, prompts, {token: merged.spec.tokens[token]}, [name])[name]
            found[name] = {metric: [round(x, 5) for x in values.tolist()] for metric, values in scores.items()}
            rows.append((f"{name} by {variant}", list(zip(prompts[:8], images[:8], strict=True))))
    grid = path_of(folder, "scores", f"{variant}/{seed}/{joined}").with_suffix(".png")
    grid.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(grid)
    return found


@lru_cache(maxsize=1)
def _scorer_of_process(judge: str) -> Scorer:
    return prepare([load_judge(judge)], reference_images(all_concepts()))


def _adapter_path(folder: Path, variant: str, seed: int, name: str) -> Path:
    return folder / "adapters" / trained_as(variant) / str(seed) / f"{name}.safetensors"


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), *sys.argv[2:])
