"""The Train tab: images in, a queue of trainings, each with its loss, previews and the time it still takes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.data.concept import EXTENSIONS, default_roots, known_concepts, load_concept
from sbora_diffusion.data.images import load_image
from sbora_diffusion.methods.registry import METHODS
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.recipes.config import other_recipes
from sbora_diffusion.studio.jobs import Jobs
from sbora_diffusion.studio.messages import told
from sbora_diffusion.studio.session import DEFAULT_BASE, Workshop
from sbora_diffusion.studio.train_view import NOTHING, watcher
from sbora_diffusion.studio.uploads import caption_lines, write_concept
from sbora_diffusion.training.checkpoint import CHECKPOINT
from sbora_diffusion.utils.errors import SboraError

OWN = "my own images"
NAMELESS = "<name>"  # in captions, while there is no name
USUAL = "usual"  # the recipe that nobody has to ask for
PERIOD = 1.0  # seconds between looks at the run folder

Said = tuple[str, tuple[str, ...]]  # what the captions are of: the token in them, the images, a line each


def train_tab(workshop: Workshop, jobs: Jobs) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Lay it out and wire it up.

    Returns:
        The choice of what to teach and of the base model, for others to renew.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            source = gr.Dropdown([OWN], value=OWN, label="What to teach", elem_id="source")
            with gr.Group() as own:
                files, name, noun, captions = _own_images()
            shown = gr.Gallery(
                label="Images",
                columns=5,
                height="auto",
                visible=False,
                elem_id="given",
                elem_classes="pixels",
                interactive=False,
            )
            start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            with gr.Accordion("More", open=False, elem_id="train-more"):
                base, method, recipe, steps, rank = _recipe()
        with gr.Column(scale=3, min_width=320):
            chosen = gr.Dropdown([], value=None, label="Training", visible=False, elem_id="chosen")
            status = gr.HTML(NOTHING, elem_id="status")
            with gr.Row():
                stop = gr.Button("Stop", size="sm", visible=False, elem_id="stop")
                resume = gr.Button("Resume", size="sm", visible=False, elem_id="resume")
            image, plot = _progress()
    timer = gr.Timer(PERIOD)
    seen = gr.State(("", "", -1, ""))

    said = gr.State((NAMELESS, ()))
    gr.on([files.change, name.blur], _captions, [files, name, captions, said], [captions, said], queue=False)
    source.input(told(partial(_show_source, workshop)), source, [own, shown, name, noun], queue=False)
    gr.on([base.change, method.change], told(_recipes), [base, method], recipe, queue=False)
    fields = [source, files, name, noun, captions, base, method, recipe, steps, rank]
    start.click(told(lambda *values: start_training(workshop, jobs, *values)), fields, chosen, concurrency_limit=1)
    stop.click(told(jobs.stop), chosen, None)
    resume.click(told(lambda name: resume_training(workshop, jobs, name)), chosen, None)
    outputs = [chosen, status, stop, resume, image, plot, seen]
    timer.tick(watcher(workshop, jobs), [chosen, seen], outputs, queue=False, show_progress="hidden")
    return source, base


def _own_images() -> tuple[gr.File, gr.Textbox, gr.Textbox, gr.Textbox]:
    """Images, name, class noun and captions."""
    files = gr.File(
        label="Drop 3 to 10 images of one thing",
        file_count="multiple",
        file_types=list(EXTENSIONS),
        height=150,
        elem_id="images",
    )
    with gr.Row():
        name = gr.Textbox("", label="Its name", placeholder="my-mug", info="prompts say <my-mug>", elem_id="name")
        noun = gr.Textbox("", label="What kind of thing", placeholder="mug", info="a word", elem_id="noun")
    captions = gr.Textbox(
        "",
        label="What each image shows, a line each",
        info="with the name in angle brackets",
        lines=4,
        max_lines=12,
        elem_id="captions",
    )
    return files, name, noun, captions


def _recipe() -> tuple[gr.Dropdown, gr.Dropdown, gr.Dropdown, gr.Number, gr.Number]:
    """Base model, method, recipe, steps and rank."""
    number = partial(gr.Number, 0, info="0: the recipe's", precision=0, minimum=0, min_width=110)
    base = gr.Dropdown([DEFAULT_BASE], value=DEFAULT_BASE, label="Base model", elem_id="train-base")
    with gr.Row():
        method = gr.Dropdown(
            list(METHODS), value=METHODS[0], label="Method", info="how it is learned", min_width=140, elem_id="method"
        )
        recipe = gr.Dropdown(
            [USUAL, *other_recipes(DEFAULT_BASE, METHODS[0])],
            value=USUAL,
            label="Recipe",
            info="loud shows more of it",
            min_width=140,
            elem_id="recipe",
        )
    with gr.Row():
        steps = number(label="Steps", maximum=20000, elem_id="train-steps")
        rank = number(label="Rank", maximum=256)
    return base, method, recipe, steps, rank


def _progress() -> tuple[gr.Image, gr.LinePlot]:
    """The latest preview and the loss; not seen before there is one."""
    image = gr.Image(
        label="Preview",
        show_label=False,
        visible=False,
        interactive=False,
        elem_id="preview",
        buttons=["fullscreen"],
    )
    plot = gr.LinePlot(x="step", y="loss", x_title="step", y_title="loss", height=220, visible=False, elem_id="loss")
    return image, plot


def teachable(workshop: Workshop) -> tuple[Any, Any]:
    """The sources and bases that there are now."""
    known = [name for name in known_concepts(_roots(workshop)) if name not in workshop.library.names()]
    return gr.update(choices=[OWN, *known]), gr.update(choices=workshop.bases())


def _roots(workshop: Workshop) -> Sequence[Path]:
    return (workshop.folders.concepts, *default_roots()[1:])


def _captions(files: Sequence[str] | None, name: str, captions: str, said: Said) -> tuple[str, Said]:
    """Captions for these images under this name, and what they are of now."""
    token, before = said
    now = f"<{name.strip()}>" if name.strip() else NAMELESS, tuple(map(str, files or []))
    return "\n".join(caption_lines(captions, now[1], before, token, now[0])), now


def _show_source(workshop: Workshop, source: str) -> tuple[Any, ...]:
    """Fields for own images, or the images of a concept that is there."""
    if source == OWN:
        return gr.update(visible=True), gr.update(visible=False), "", ""
    concept = load_concept(source, _roots(workshop))
    images = [(load_image(image.path), image.caption) for image in concept.images]
    return gr.update(visible=False), gr.update(value=images, visible=True), "", ""


def _recipes(base: str, method: str) -> Any:
    """The recipes that there are for these."""
    return gr.update(choices=[USUAL, *other_recipes(recipe_base(base), method)], value=USUAL)


def start_training(
    workshop: Workshop,
    jobs: Jobs,
    source: str,
    files: Sequence[str] | None,
    name: str,
    noun: str,
    captions: str,
    base: str,
    method: str,
    recipe: str,
    steps: float,
    rank: float,
) -> Any:
    """Make the concept's folder and queue its training; the choice of trainings, with this one chosen."""
    name = (name or "").strip() if source == OWN else load_concept(source, _roots(workshop)).name
    _check_new(workshop, jobs, name, base)
    if source == OWN:
        lines = (captions or "").splitlines()
        images = [(Path(file), lines[i] if i < len(lines) else "") for i, file in enumerate(files or [])]
        write_concept(workshop.folders.concepts, name, noun or "", images)
    settings = ["--set", f"steps={int(steps)}"] if steps else []
    settings += ["--rank", str(int(rank))] if rank else []
    settings += ["--set", f"recipe={recipe}"] if recipe != USUAL else []
    taught = name if source == OWN else source
    jobs.add(name, ["train", "--concept", taught, "--base", base, "--method", method, *settings])
    return gr.update(choices=[job.name for job in jobs.all() if job.arguments[0] == "train"], value=name, visible=True)


def _check_new(workshop: Workshop, jobs: Jobs, name: str, base: str) -> None:
    if base not in workshop.bases():
        raise SboraError(f"got the base model {base!r}, expected one of {', '.join(workshop.bases())}")
    job = jobs.find(name)
    if job and job.is_active:
        raise SboraError(f"{name} is {job.state} already")
    if (workshop.folders.runs / name / CHECKPOINT).exists():
        raise SboraError(f"a training of {name} was stopped half-way", "Choose it on the right and resume it.")
    if name in workshop.library.names():
        raise SboraError(f"{name} is in the library already", "Choose another name.")


def resume_training(workshop: Workshop, jobs: Jobs, name: str) -> None:
    """Go on from the last checkpoint, or begin again where there is none yet."""
    job = jobs.find(name)
    if job is None:
        raise SboraError("no training is chosen", "Choose one of those that were stopped.")
    arguments = [word for word in job.arguments if word != "--resume"]
    going_on = (workshop.folders.runs / name / CHECKPOINT).exists()
    jobs.add(name, [*arguments, "--resume"] if going_on else arguments)
