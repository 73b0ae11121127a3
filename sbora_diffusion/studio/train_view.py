"""How a training looks while it runs: its state, a bar, the loss, the latest preview."""

import html
from collections.abc import Callable
from typing import Any

import gradio as gr
import pandas as pd

from sbora_diffusion.studio.jobs import Job, Jobs
from sbora_diffusion.studio.session import Workshop
from sbora_diffusion.studio.uploads import Progress, progress, smoothed

NOTHING = "<p class='note'>Trainings appear here. They go on when this page is closed.</p>"
POINTS = 200  # of the plot
SKIP = gr.skip()

Seen = tuple[str, str, int, str]  # of what is shown: job, state, step, image
Update = tuple[Any, ...]


def watcher(workshop: Workshop, jobs: Jobs) -> Callable[[str | None, Seen], Update]:
    """The timer's handler: what has changed since it was shown last."""

    def look(chosen: str | None, seen: Seen) -> Update:
        queue = jobs.all()
        trainings = [job for job in queue if job.arguments[0] == "train"]
        job = next((job for job in trainings if job.name == chosen), trainings[-1] if trainings else None)
        if job is None:
            return (SKIP,) * 7
        run = progress(workshop.folders.runs / job.name)
        now = (job.name, job.state, run.step, str(run.image or ""))
        if now == tuple(seen) and job.state != "running":
            return (SKIP,) * 7
        names = [training.name for training in trainings]
        choice = gr.update(choices=names, value=job.name, visible=True) if now[:2] != tuple(seen)[:2] else SKIP
        return (choice, describe(job, run, _ahead(queue, job)), *_buttons(job), *_images(run, now, seen), now)

    return look


def describe(job: Job, run: Progress, ahead: int) -> str:
    """A title, a bar and a line of words, in HTML."""
    share = 100 * run.step / run.steps if run.steps else 0
    words = {
        "waiting": f"waiting for {ahead} before it",
        "running": _pace(run),
        "done": "done: it is in Generate now",
        "stopped": f"stopped at step {run.step} of {run.steps}" if run.steps else "stopped before it began",
        "failed": "",
    }[job.state]
    why = f"<span class='why'>{html.escape(job.message)}</span>" if job.state == "failed" else ""
    return (
        f"<div class='job' data-state='{job.state}'><b>{html.escape(job.name)}</b>"
        f"<span class='note'>{words}</span>{why}"
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


def _ahead(queue: list[Job], job: Job) -> int:
    """How many jobs of any kind, evaluations too, come before it."""
    return sum(other.is_active for other in queue[: queue.index(job)])


def _buttons(job: Job) -> tuple[Any, Any]:
    return gr.update(visible=job.is_active), gr.update(visible=job.state in ("stopped", "failed"))


def _images(run: Progress, now: Seen, seen: Seen) -> tuple[Any, Any]:
    """The preview if it is a new one, the plot if there are new steps."""
    before = tuple(seen)
    same_job = now[0] == before[0]
    image = gr.update(value=now[3] or None, visible=bool(now[3]))
    frame = pd.DataFrame(smoothed(run.losses)[:: max(1, len(run.losses) // POINTS)], columns=["step", "loss"])
    plot = gr.update(value=frame, visible=len(run.losses) > 1)
    return SKIP if same_job and now[3] == before[3] else image, SKIP if same_job and now[2] == before[2] else plot
