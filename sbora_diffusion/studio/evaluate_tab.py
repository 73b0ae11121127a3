"""The Evaluate tab: a judge scores concepts, single and merged; a table, a scatter of text and image, the images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from sbora_diffusion.evaluation.judges import clip, vision
from sbora_diffusion.evaluation.report import main_metrics
from sbora_diffusion.studio.fields import INSTANT, Refresh, concept_chips, concept_choices, image_gallery, number_chips
from sbora_diffusion.studio.jobs import Job, Jobs
from sbora_diffusion.studio.messages import error_text, sentence, show_errors
from sbora_diffusion.studio.session import Session
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_json

NONE = "none"
MAX_NAME = 60  # letters of a result's name, which names a folder and a log file
REPORT = "report.json"
PERIOD = 1.5  # seconds between updates of the view
NOTHING = "Every score comes with a confidence interval."

STATUS = {
    "waiting": "Waiting for earlier jobs …",
    "done": "Done.",
    "stopped": "Stopped. Evaluate the same selection again to resume.",
}
SKIP = gr.skip()

Shown = tuple[str, str, str]  # job, state, status text


def evaluate_tab(session: Session, jobs: Jobs) -> Refresh:
    """Lay out the tab and connect its events."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            selected = concept_chips("evaluate-concepts")
            merged = gr.Dropdown([NONE], value=NONE, label="Compare with a merge of them", elem_id="evaluate-merged")
            seeds = number_chips((1, 2, 4), 1, "Images for each of 20 prompts", "seeds")
            button = gr.Button("Evaluate", variant="primary", size="lg", elem_id="evaluate")
            status = gr.Markdown(NOTHING, elem_classes="note", elem_id="evaluate-status")
            stop = gr.Button("Stop", size="sm", visible=False, elem_id="evaluate-stop")
        with gr.Column(scale=3, min_width=320):
            result = gr.Dropdown([], value=None, label="Result", visible=False, elem_id="result")
            table = gr.Dataframe(visible=False, interactive=False, wrap=True, elem_id="scores")
            scatter = gr.ScatterPlot(
                x="text (mos)", y="image", color="concept", height=300, visible=False, elem_id="scatter"
            )
            grid = image_gallery("evaluate-images", 4, visible=False, buttons=None)
    last = gr.State(("", "", ""))
    views = [table, scatter, grid]
    button.click(show_errors(partial(_start, session, jobs)), [selected, merged, seeds], status, concurrency_limit=1)
    stop.click(show_errors(lambda last: jobs.stop(last[0])), last, None)
    result.input(show_errors(partial(_show, session)), result, views, queue=False)
    gr.Timer(PERIOD).tick(watcher(session, jobs), last, [status, stop, result, *views, last], **INSTANT)
    return Refresh(partial(_refresh, session), selected, [selected, merged, result])


def _refresh(session: Session, selected: Sequence[str]) -> tuple[Any, Any, Any]:
    specs, results = session.specs(), _results(session)
    merges = [name for name, spec in specs.items() if spec.parents]
    return (
        concept_choices([name for name in specs if name not in merges], selected),
        gr.update(choices=[NONE, *merges]),
        gr.update(choices=results, visible=bool(results)),
    )


def _results(session: Session) -> list[str]:
    """Return complete evaluations, the newest first."""
    reports = session.folders.evaluations.glob(f"*/{REPORT}")
    return [path.parent.name for path in sorted(reports, key=lambda path: path.stat().st_mtime, reverse=True)]


def _start(session: Session, jobs: Jobs, selected: Sequence[str], merged: str, seeds: int) -> str:
    """Queue an evaluation; return the status text."""
    if not selected:
        raise SboraError("no concept is selected", "Select one or more.")
    names = [session.load(name).spec.name for name in selected]
    folder = result_name(names, merged, seeds)
    options = ["--merged", merged] if merged != NONE else []
    out = str(session.folders.evaluations / folder)
    jobs.add(f"eval {folder}", ["eval", *selected, *options, "--set", f"seeds={seeds}", "--out", out, "--force"])
    return "Waiting …"


def result_name(names: Sequence[str], merged: str, seeds: int) -> str:
    """Return a name for an evaluation: all its parts, or the first of them with their number and a hash."""
    full = "-".join([*names, *([f"in-{merged}"] if merged != NONE else []), f"x{seeds}"])
    if len(full) <= MAX_NAME:
        return full
    tail = f"-of-{len(names)}-{hashlib.sha256(full.encode()).hexdigest()[:8]}-x{seeds}"
    return full[: MAX_NAME - len(tail)] + tail


def watcher(session: Session, jobs: Jobs) -> Callable[[Shown], tuple[Any, ...]]:
    """Return the timer's handler, which shows the latest evaluation's status, and its result when it is done."""

    def update(shown: Shown) -> tuple[Any, ...]:
        job = _current(jobs, shown[0])
        now = (job.name, job.state, _status(jobs, job)) if job else shown
        if job is None or tuple(shown) == now:
            return (SKIP,) * 7
        status, *views = _views(session, job, now[2])
        return (status, gr.update(visible=job.is_active), *views, now)

    return update


def _current(jobs: Jobs, shown: str) -> Job | None:
    """Return the latest evaluation that is active, else the one already shown, else the latest."""
    evaluations = jobs.all("eval")
    active = [job for job in evaluations if job.is_active]
    known = [job for job in evaluations if job.name == shown]
    return next(reversed(active or known or evaluations), None)


def _views(session: Session, job: Job, status: str) -> tuple[Any, ...]:
    """Return the status and, when the evaluation is done, updates for its name, table, scatter plot and images."""
    if job.state != "done":
        return (status, *(SKIP,) * 4)
    name = job.name.removeprefix("eval ")
    try:
        return (status, gr.update(choices=_results(session), value=name, visible=True), *_show(session, name))
    except SboraError as error:  # its folder was deleted: no message at every tick
        return (error_text(error), *(SKIP,) * 4)


def _status(jobs: Jobs, job: Job) -> str:
    if job.state == "failed":
        return sentence(job.message)
    if job.is_to_stop and job.is_active:
        return "Stopping …"
    if job.state != "running":
        return STATUS[job.state]
    lines = reversed(jobs.output(job.name).splitlines())
    return next((f"{line} …" for line in lines if line.endswith("images")), "Preparing …")


def _show(session: Session, name: str) -> tuple[Any, Any, Any]:
    """Return table, scatter plot and images of an evaluation; names from the page cannot escape the folder."""
    if name not in _results(session):
        raise SboraError(f"the result {name!r} no longer exists", "Evaluate again.")
    folder = session.folders.evaluations / name
    try:
        results = read_json(folder / REPORT)["results"]
        views = _table(results), _points(results), _images(results, folder)
    except (SboraError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SboraError(f"the result {name} cannot be read ({error})", "Evaluate again.") from None
    table, points, images = (gr.update(value=view, visible=True) for view in views)
    return table, points, images


def _table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each concept and model: means with their intervals."""
    rows = []
    for result in results:
        metrics = main_metrics(clip.METRICS | vision.METRICS)
        scores = {metric.title: _cell(result["estimates"].get(key)) for key, metric in metrics.items()}
        rows.append({"concept": result["concept"], "model": result["model"], "n": result["n"], **scores})
    frame = pd.DataFrame(rows)
    return frame.loc[:, (frame != "").any()]


def _cell(estimate: Mapping[str, float] | None) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate else ""


def _points(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a point for each concept, model and prompt."""
    return pd.DataFrame(
        {
            "concept": f"{result['concept']}, {result['model']}",
            "prompt": prompt["prompt"],
            "text (mos)": prompt["mean"]["text_mos"],
            "image": prompt["mean"]["image"],
        }
        for result in results
        for prompt in result["prompts"]
    )


def _images(results: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """Return the first image of every prompt, prompt by prompt, labelled with the prompt and the model."""
    rows = zip(*([(result["model"], prompt) for prompt in result["prompts"]] for result in results), strict=True)
    labelled = [(prompt["images"][0]["file"], f"{prompt['prompt']} ({model})") for row in rows for model, prompt in row]
    return [(str(folder / file), label) for file, label in labelled if (folder / file).is_file()]
