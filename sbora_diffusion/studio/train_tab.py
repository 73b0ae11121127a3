"""The Train tab: upload images, queue a training, and watch its loss, previews and remaining time."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.data.concept import default_roots, known_concepts, load_concept
from sbora_diffusion.data.folder import EXTENSIONS
from sbora_diffusion.data.images import load_image
from sbora_diffusion.methods.registry import method_names
from sbora_diffusion.models.loading import recipe_base
from sbora_diffusion.recipes.config import other_recipes
from sbora_diffusion.studio.fields import INSTANT, Refresh, hidden_image, image_gallery
from sbora_diffusion.studio.jobs import Jobs
from sbora_diffusion.studio.messages import show_errors
from sbora_diffusion.studio.session import DEFAULT_BASE, Session, check_length
from sbora_diffusion.studio.train_view import NOTHING, watcher
from sbora_diffusion.studio.uploads import caption_lines, write_concept
from sbora_diffusion.training.checkpoint import CHECKPOINT
from sbora_diffusion.utils.errors import SboraError

OWN = "my own images"
NAMELESS = "<name>"  # in captions, until there is a name
DEFAULT_RECIPE = "default"
PERIOD = 1.0  # seconds between updates of the view

Captioned = tuple[str, tuple[str, ...]]  # the token in the captions, and the images that they belong to


def train_tab(session: Session, jobs: Jobs) -> Refresh:
    """Lay out the tab and connect its events."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            source = gr.Dropdown([OWN], value=OWN, label="Train on", elem_id="source")
            with gr.Group() as own:
                files, name, noun, captions = _own_images()
            shown = image_gallery("source-images", 5, show_label=True, visible=False, buttons=None)
            start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            with gr.Accordion("More", open=False, elem_id="train-more"):
                base, method, recipe, steps, rank = _recipe()
        with gr.Column(scale=3, min_width=320):
            chosen = gr.Dropdown([], value=None, label="Training", visible=False, elem_id="chosen")
            status = gr.HTML(NOTHING, elem_id="status")
            with gr.Row():
                stop = gr.Button("Stop", size="sm", visible=False, elem_id="stop")
                resume = gr.Button("Resume", size="sm", visible=False, elem_id="resume")
            image = hidden_image("preview", "Preview", "fullscreen")
            plot = gr.LinePlot(
                x="step", y="loss", x_title="step", y_title="loss", height=220, visible=False, elem_id="loss"
            )

    captioned = gr.State((NAMELESS, ()))
    gr.on([files.change, name.blur], _captions, [files, name, captions, captioned], [captions, captioned], queue=False)
    source.input(show_errors(partial(_show_source, session)), source, [own, shown, name, noun], queue=False)
    gr.on([base.change, method.change], show_errors(_recipes), [base, method], recipe, queue=False)
    fields = [source, files, name, noun, captions, base, method, recipe, steps, rank]
    start.click(show_errors(partial(start_training, session, jobs)), fields, chosen, concurrency_limit=1)
    stop.click(show_errors(jobs.stop), chosen, None)
    resume.click(show_errors(partial(resume_training, session, jobs)), chosen, None)
    last = gr.State(("", "", -1, ""))
    outputs = [chosen, status, stop, resume, image, plot, last]
    gr.Timer(PERIOD).tick(watcher(session, jobs), [chosen, last], outputs, **INSTANT)
    return Refresh(partial(_refresh, session), None, [source, base])


def _own_images() -> tuple[gr.File, gr.Textbox, gr.Textbox, gr.Textbox]:
    """Add the fields for images, name, class noun and captions."""
    files = gr.File(
        label="Drop 3 to 10 images of one subject",
        file_count="multiple",
        file_types=list(EXTENSIONS),
        height=170,
        elem_id="images",
    )
    with gr.Row():
        name = gr.Textbox("", label="Name", placeholder="my-mug", info="used in prompts as <my-mug>", elem_id="name")
        noun = gr.Textbox("", label="Class noun", placeholder="mug", info="the kind of thing", elem_id="noun")
    captions = gr.Textbox(
        "",
        label="Captions, one line per image",
        info="with the name in angle brackets",
        lines=4,
        max_lines=12,
        elem_id="captions",
    )
    return files, name, noun, captions


def _recipe() -> tuple[gr.Dropdown, gr.Dropdown, gr.Dropdown, gr.Number, gr.Number]:
    """Add the fields for base model, method, recipe, steps and rank."""
    number = partial(gr.Number, 0, info="0: from the recipe", precision=0, minimum=0, min_width=110)
    base = gr.Dropdown([DEFAULT_BASE], value=DEFAULT_BASE, label="Base model", elem_id="train-base")
    with gr.Row():
        methods = method_names()
        method = gr.Dropdown(list(methods), value=methods[0], label="Method", min_width=140, elem_id="method")
        recipe = gr.Dropdown(
            [DEFAULT_RECIPE, *other_recipes(DEFAULT_BASE, methods[0])],
            value=DEFAULT_RECIPE,
            label="Recipe",
            min_width=140,
            elem_id="recipe",
        )
    with gr.Row():
        steps = number(label="Steps", maximum=20000, elem_id="train-steps")
        rank = number(label="Rank", maximum=256)
    return base, method, recipe, steps, rank


def _refresh(session: Session) -> tuple[Any, Any]:
    known = [name for name in known_concepts(_roots(session)) if name not in session.library.names()]
    return gr.update(choices=[OWN, *known]), gr.update(choices=session.bases())


def _roots(session: Session) -> Sequence[Path]:
    return (session.folders.concepts, *default_roots()[1:])


def _captions(files: Sequence[str] | None, name: str, captions: str, captioned: Captioned) -> tuple[str, Captioned]:
    """Return captions for the current images and name."""
    token, before = captioned
    now = f"<{name.strip()}>" if name.strip() else NAMELESS, tuple(map(str, files or []))
    return "\n".join(caption_lines(captions, now[1], before, token, now[0])), now


def _show_source(session: Session, source: str) -> tuple[Any, ...]:
    """Show the fields for own images, or the images of an existing concept."""
    if source == OWN:
        return gr.update(visible=True), gr.update(visible=False), "", ""
    concept = load_concept(source, _roots(session))
    images = [(load_image(image.path), image.caption) for image in concept.images]
    return gr.update(visible=False), gr.update(value=images, visible=True), "", ""


def _recipes(base: str, method: str) -> Any:
    return gr.update(choices=[DEFAULT_RECIPE, *other_recipes(recipe_base(base), method)], value=DEFAULT_RECIPE)


def start_training(
    session: Session,
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
    """Create the concept's folder and queue its training; return the choice of trainings with this one selected."""
    name = (name or "").strip() if source == OWN else load_concept(source, _roots(session)).name
    _check_new(session, jobs, name, base)
    if source == OWN:
        lines = (captions or "").splitlines()
        images = [(Path(file), lines[i] if i < len(lines) else "") for i, file in enumerate(files or [])]
        check_length(name, noun or "", *lines)
        write_concept(session.folders.concepts, name, noun or "", images)
    options = ["--set", f"steps={int(steps)}"] if steps else []
    options += ["--rank", str(int(rank))] if rank else []
    options += ["--set", f"recipe={recipe}"] if recipe != DEFAULT_RECIPE else []
    folder = name if source == OWN else source
    jobs.add(name, ["train", "--concept", folder, "--base", base, "--method", method, *options])
    return gr.update(choices=[job.name for job in jobs.all("train")], value=name, visible=True)


def _check_new(session: Session, jobs: Jobs, name: str, base: str) -> None:
    if base not in session.bases():
        raise SboraError(f"got the base model {base!r}, expected one of {', '.join(session.bases())}")
    job = jobs.find(name)
    if job and job.is_active:
        raise SboraError(f"{name} is already {job.state}")
    if (session.folders.runs / name / CHECKPOINT).exists():
        raise SboraError(f"the training of {name} was interrupted", "Select it on the right and resume it.")
    if name in session.library.names():
        raise SboraError(f"{name} is already in the library", "Choose another name.")
    jobs.check_room()


def resume_training(session: Session, jobs: Jobs, name: str) -> None:
    """Resume from the last checkpoint, or start again if there is none yet."""
    job = jobs.find(name)
    if job is None:
        raise SboraError("no training is selected", "Select one that was stopped.")
    arguments = [word for word in job.arguments if word != "--resume"]
    has_checkpoint = (session.folders.runs / name / CHECKPOINT).exists()
    jobs.add(name, [*arguments, "--resume"] if has_checkpoint else arguments)
