"""What the three pre-training commands share: resumable state, learning-rate schedule, progress, sample sheets."""

import argparse
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tools.emoji.art import default_data_dir


def cosine(step: int, steps: int, warmup: int, hold: float = 0.0, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, flat until `hold` of the run, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = max(0.0, (step / steps - hold) / (1 - hold))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Float32(TorchFunctionMode):
    """Numbers stay float32 where code says `.bfloat16()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (Tensor.float if func is Tensor.bfloat16 else func)(*args, **(kwargs or {}))


def arithmetic(device: str = "cpu") -> AbstractContextManager[Any]:
    """bfloat16 where the device multiplies it itself; float32 on other CPUs, many times faster than emulating it."""
    known = torch.cpu.get_capabilities()
    if device != "cpu" or any(known.get(key) for key in ("avx512_bf16", "amx_bf16")):
        return torch.autocast(device, dtype=torch.bfloat16)
    return _Float32()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The checkpoint, or None where there is none yet."""
    return torch.load(path, weights_only=True) if path.exists() else None


def save_sheet(path: Path, sheet: np.ndarray) -> None:
    """Store a (H, W, 3) uint8 sheet as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def count_steps(first: int, last: int, title: str) -> Iterator[tuple[int, Progress]]:
    """Steps `first` to `last - 1` under a progress bar; print through the yielded Progress's console."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=last, completed=first)
        for step in range(first, last):
            yield step, progress
            progress.advance(task)


def arguments(description: str, steps: int, batch: int, learning_rate: float) -> argparse.ArgumentParser:
    """The flags that every pre-training command has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data_dir(), help="folder of art, checkpoints and samples")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=int, default=200, help="steps between reports, samples and checkpoints")
    return parser
