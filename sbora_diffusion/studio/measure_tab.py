"""The Measure tab: a judge scores concepts, alone and merged; a table, a scatter of text and image, the images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from sbora_diffusion.evaluation.reports.report import read_report
from sbora_diffusion.studio.jobs import Job, Jobs
from sbora_diffusion.studio.messages import in_words, sentence, told
from sbora_diffusion.studio.session import Workshop
from sbora_diffusion.utils.errors import SboraError

NONE = "none"
LONGEST = 60  # letters of a result's name: it is a folder, and the log beside the queue is called so, too
REPORT = "report.json"
PERIOD = 1.5  # seconds between looks at what runs
NOTHING = "Scores say more than a look at a few images: each comes with its interval."

WORDS = {
    "waiting": "Waiting for what runs before it …",
    "done": "Done.",
    "stopped": "Stopped. Measure the same again, and it goes on.",
}
SKIP = gr.skip()

Seen = tuple[str, str, str]  # of what is shown: job, state, words


def measure_tab(workshop: Workshop, jobs: Jobs) -> tuple[gr.CheckboxGroup, gr.Dropdown, gr.Dropdown]:
    """Lay it out and wire it up; the choices of concepts, merge and past results, to be renewed."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            picked = gr.CheckboxGroup([], label="Concepts", elem_id="measure-concepts", elem_classes="chips")
            merged = gr.Dropdown([NONE], value=NONE, label="Compare with a merge of them", elem_id="measure-merged")
            seeds = gr.Radio(
                [1, 2, 4], value=1, label="Images for each of 20 prompts", elem_id="seeds", elem_classes="chips"
            )
            button = gr.Button("Measure", variant="primary", size="lg", elem_id="measure")
            status = gr.Markdown(NOTHING, elem_classes="note", elem_id="measure-status")
            stop = gr.Button("Stop", size="sm", visible=False, elem_id="measure-stop")
        with gr.Column(scale=3, min_width=320):
            result = gr.Dropdown([], value=None, label="Result", visible=False, elem_id="result")
            table = gr.Dataframe(visible=False, interactive=False, wrap=True, elem_id="scores")
            scatter = gr.ScatterPlot(
                x="text (mos)", y="image", color="concept", height=300, visible=False, elem_id="scatter"
            )
            grid = gr.Gallery(
                label="Images",
                show_label=False,
                columns=4,
                object_fit="contain",
                height="auto",
                visible=False,
                interactive=False,
                elem_id="measure-grid",
                elem_classes="pixels",
            )
    seen = gr.State(("", "", ""))
    button.click(told(partial(_start, workshop, jobs)), [picked, merged, seeds], status, concurrency_limit=1)
    stop.click(told(lambda seen: jobs.stop(seen[0])), seen, None)
    result.input(told(partial(_show, workshop)), result, [table, scatter, grid], queue=False)
    gr.Timer(PERIOD).tick(
        watcher(workshop, jobs),
        seen,
        [status, stop, result, table, scatter, grid, seen],
        queue=False,
        show_progress="hidden",
    )
    return picked, merged, result


def measurable(workshop: Workshop, chosen: Sequence[str]) -> tuple[Any, Any, Any]:
    """The concepts, merges and results that there are now."""
    specs = {name: spec for base in workshop.bases() for name, spec in workshop.concepts(base).items()}
    single = [name for name, spec in specs.items() if not spec.parents]
    merges = [name for name, spec in specs.items() if spec.parents]
    results = _results(workshop)
    return (
        gr.update(choices=single, value=[name for name in chosen if name in single]),
        gr.update(choices=[NONE, *merges]),
        gr.update(choices=results, visible=bool(results)),
    )


def _results(workshop: Workshop) -> list[str]:
    """Evaluations that are complete, the newest first."""
    reports = workshop.folders.evaluations.glob(f"*/{REPORT}")
    return [path.parent.name for path in sorted(reports, key=lambda path: path.stat().st_mtime, reverse=True)]


def _start(workshop: Workshop, jobs: Jobs, picked: Sequence[str], merged: str, seeds: int) -> str:
    """Queue an evaluation; what the page says of it."""
    if not picked:
        raise SboraError("no concept is picked", "Pick one or more.")
    names = [workshop.load(name).spec.name for name in picked]
    folder = result_name(names, merged, seeds)
    options = ["--merged", merged] if merged != NONE else []
    out = str(workshop.folders.evaluations / folder)
    jobs.add(f"eval {folder}", ["eval", *picked, *options, "--set", f"seeds={seeds}", "--out", out, "--force"])
    return "Waiting …"


def result_name(names: Sequence[str], merged: str, seeds: int) -> str:
    """What an evaluation is called: all that it is of, or the beginning of that, a count and a hash of it."""
    whole = "-".join([*names, *([f"in-{merged}"] if merged != NONE else []), f"x{seeds}"])
    if len(whole) <= LONGEST:
        return whole
    tail = f"-of-{len(names)}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}-x{seeds}"
    return whole[: LONGEST - len(tail)] + tail


def watcher(workshop: Workshop, jobs: Jobs) -> Callable[[Seen], tuple[Any, ...]]:
    """The timer's handler: what the latest evaluation is doing, and its result once it is there."""

    def look(seen: Seen) -> tuple[Any, ...]:
        job = _shown(jobs, seen[0])
        now = (job.name, job.state, _words(jobs, job)) if job else seen
        if job is None or tuple(seen) == now:
            return (SKIP,) * 7
        said, *views = _seen_of(workshop, job, now[2])
        return (said, gr.update(visible=job.is_active), *views, now)

    return look


def _shown(jobs: Jobs, before: str) -> Job | None:
    """The latest evaluation that is not over, else the one shown before, else the latest."""
    evaluations = [job for job in jobs.all() if job.arguments[0] == "eval"]
    active = [job for job in evaluations if job.is_active]
    known = [job for job in evaluations if job.name == before]
    return next(reversed(active or known or evaluations), None)


def _seen_of(workshop: Workshop, job: Job, said: str) -> tuple[Any, ...]:
    """Words, and once it is done, the choice of its result, the table, scatter and images."""
    if job.state != "done":
        return (said, *(SKIP,) * 4)
    name = job.name.removeprefix("eval ")
    try:
        return (said, gr.update(choices=_results(workshop), value=name, visible=True), *_show(workshop, name))
    except SboraError as defect:  # somebody deleted it: no error at every tick
        return (in_words(defect), *(SKIP,) * 4)


def _words(jobs: Jobs, job: Job) -> str:
    if job.state == "failed":
        return sentence(job.message)
    if job.is_to_stop and job.is_active:
        return "Stopping …"
    if job.state != "running":
        return WORDS[job.state]
    lines = reversed(jobs.said(job.name).splitlines())
    return next((f"{line} …" for line in lines if line.endswith("images")), "Preparing …")


def _show(workshop: Workshop, name: str) -> tuple[Any, Any, Any]:
    """Table, scatter and images of one evaluation, which a name from the page cannot leave."""
    if name not in _results(workshop):
        raise SboraError(f"there is no result {name!r} any more", "Measure again.")
    folder = workshop.folders.evaluations / name
    try:
        results, titles = read_report(folder / REPORT)
        table, points, images = _table(results, titles), _points(results), _images(results, folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SboraError(f"the result {name} cannot be read ({error})", "Measure again.") from None
    return (
        gr.update(value=table, visible=True),
        gr.update(value=points, visible=True),
        gr.update(value=images, visible=True),
    )


def _table(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> pd.DataFrame:
    """A line for each concept and model, means with their intervals."""
    rows = []
    for result in results:
        scores = {title: _cell(result["estimates"].get(metric)) for metric, title in titles.items()}
        rows.append({"concept": result["concept"], "model": result["model"], "n": result["n"], **scores})
    frame = pd.DataFrame(rows)
    return frame.loc[:, (frame != "").any()]


def _cell(estimate: Mapping[str, float] | None) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate else ""


def _points(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A point for each concept, model and prompt."""
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
    """The first image of every prompt, prompt by prompt, with what it was asked to show and by whom it was made."""
    rows = zip(*([(result["model"], prompt) for prompt in result["prompts"]] for result in results), strict=True)
    named = [(prompt["images"][0]["file"], f"{prompt['prompt']} ({model})") for row in rows for model, prompt in row]
    return [(str(folder / file), words) for file, words in named if (folder / file).is_file()]
