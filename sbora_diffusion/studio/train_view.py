"""The view of a running training: its state, a progress bar, the loss, the latest preview."""

import html
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from sbora_diffusion.studio.jobs import Job, Jobs
from sbora_diffusion.studio.session import Session
from sbora_diffusion.training.checkpoint import read_log

NOTHING = "<p class='note'>Trainings appear here. They continue when this page is closed.</p>"
RECENT = 30  # steps whose duration the estimate is based on
POINTS = 200  # of the plot
SKIP = gr.skip()

Shown = tuple[str, str, int, str]  # job, state, step, image
Update = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a training according to its log."""

    step: int = 0
    steps: int = 0
    losses: tuple[tuple[int, float], ...] = ()  # (step, loss)
    seconds_left: float | None = None
    image: Path | None = None  # the latest preview, at the end the images before and after


def read_progress(run: Path) -> Progress:
    """Read the progress of a training from its run folder."""
    entries = read_log(run)
    if not entries:
        return Progress()
    last, recent = entries[-1], entries[-RECENT:]
    images = [run / entry["image"] for entry in entries if entry.get("image")]
    seconds_per_step = (last["time"] - recent[0]["time"]) / max(1, len(recent) - 1)
    left = seconds_per_step * (last["steps"] - last["step"]) - (time.time() - last["time"])
    return Progress(
        step=last["step"],
        steps=last["steps"],
        losses=tuple((entry["step"], entry["loss"]) for entry in entries),
        seconds_left=max(0.0, left) if len(recent) > 1 else None,
        image=next((path for path in reversed(images) if path.is_file()), None),
    )


def smoothed(losses: Sequence[tuple[int, float]], weight: float = 0.95) -> list[tuple[int, float]]:
    """Return the bias-corrected exponential moving average: the loss of a step depends on its random timesteps."""
    total, norm, means = 0.0, 0.0, []
    for step, loss in losses:
        total, norm = weight * total + (1 - weight) * loss, weight * norm + (1 - weight)
        means.append((step, total / norm))
    return means


def watcher(session: Session, jobs: Jobs) -> Callable[[str | None, Shown], Update]:
    """Return the timer's handler, which updates what has changed since it was last shown."""

    def update(chosen: str | None, shown: Shown) -> Update:
        trainings = jobs.all("train")
        job = next((job for job in trainings if job.name == chosen), trainings[-1] if trainings else None)
        if job is None:
            return (SKIP,) * 7
        run = read_progress(session.folders.runs / job.name)
        now = (job.name, job.state, run.step, str(run.image or ""))
        if now == tuple(shown) and job.state != "running":
            return (SKIP,) * 7
        names = [training.name for training in trainings]
        choice = gr.update(choices=names, value=job.name, visible=True) if now[:2] != tuple(shown)[:2] else SKIP
        buttons = gr.update(visible=job.is_active), gr.update(visible=job.state in ("stopped", "failed"))
        return (choice, describe(job, run, _num_ahead(jobs, job)), *buttons, *_images(run, now, shown), now)

    return update


def describe(job: Job, run: Progress, num_ahead: int) -> str:
    """Return a title, a line of text and a progress bar in HTML."""
    share = 100 * run.step / run.steps if run.steps else 0
    text = {
        "waiting": f"waiting for {num_ahead} earlier job{'s' * (num_ahead != 1)}",
        "running": _pace(run),
        "done": "done: now available in Generate",
        "stopped": f"stopped at step {run.step} of {run.steps}" if run.steps else "stopped before the first step",
        "failed": "",
    }[job.state]
    why = f"<span class='why'>{html.escape(job.message)}</span>" if job.state == "failed" else ""
    return (
        f"<div class='job' data-state='{job.state}'><b>{html.escape(job.name)}</b>"
        f"<span class='note'>{text}</span>{why}"
        f"<div class='bar' role='progressbar' aria-label='steps' aria-valuenow='{share:.0f}' aria-valuemin='0' "
        f"aria-valuemax='100'><div style='width:{share:.1f}%'></div></div></div>"
    )


def _pace(run: Progress) -> str:
    if not run.steps:
        return "preparing"
    if run.seconds_left is None:
        return f"step {run.step} of {run.steps}"
    minutes, seconds = divmod(round(run.seconds_left), 60)
    left = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    return f"step {run.step} of {run.steps} · about {left} left"


def _num_ahead(jobs: Jobs, job: Job) -> int:
    """Return the number of active jobs before this one, evaluations included."""
    queue = jobs.all()
    return sum(other.is_active for other in queue[: queue.index(job)]) if job in queue else 0


def _images(run: Progress, now: Shown, before: Shown) -> tuple[Any, Any]:
    """Return updates for the preview and the plot, where they have changed."""
    is_same_job = now[0] == before[0]
    image = gr.update(value=now[3] or None, visible=bool(now[3]))
    frame = pd.DataFrame(smoothed(run.losses)[:: max(1, len(run.losses) // POINTS)], columns=["step", "loss"])
    plot = gr.update(value=frame, visible=len(run.losses) > 1)
    return SKIP if is_same_job and now[3] == before[3] else image, SKIP if is_same_job and now[2] == before[2] else plot
