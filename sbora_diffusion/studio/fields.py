"""Fields, handlers and event options that several tabs share."""

import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from sbora_diffusion.inference.image_file import Settings
from sbora_diffusion.models.loading import usual_sampling
from sbora_diffusion.studio.messages import show_errors
from sbora_diffusion.studio.session import DEFAULT_BASE, Session

MAX_SEED = 2**31 - 1
INSTANT: dict[str, Any] = {"queue": False, "show_progress": "hidden"}  # options of events that take no time


class Refresh(NamedTuple):
    """How a tab updates its choices when it is opened."""

    handler: Callable[..., Any]
    inputs: Any
    outputs: Any


class SamplingFields(NamedTuple):
    """The fields below the prompt of a tab that generates images."""

    button: gr.Button
    number: gr.Radio
    seed: gr.Number
    negative: gr.Textbox
    steps: gr.Slider
    guidance: gr.Slider
    base: gr.Dropdown
    dropped: gr.File

    def inputs(self, prompt: gr.Textbox, strengths: gr.State) -> list[Any]:
        """List the fields in the order of `settings_from_fields` and `fields_from_settings`."""
        return [prompt, self.base, self.negative, self.seed, self.steps, self.guidance, strengths]


def sampling_fields(tab: str, counts: Sequence[int], count: int) -> SamplingFields:
    """Lay out the button, the number of images, the seed, and the settings that few people change.

    Args:
        tab: prefix of the HTML ids.
        counts: numbers of images to choose from, `count` at first.
    """
    sampling = usual_sampling(DEFAULT_BASE)
    button = gr.Button("Generate", variant="primary", size="lg", elem_id=f"{tab}-button")
    with gr.Row(elem_classes="compact"):
        number = number_chips(counts, count, "Images", f"{tab}-count")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90, elem_id=f"{tab}-seed")
        new_seed = gr.Button("New seed", size="sm", min_width=90)
    with gr.Accordion("More", open=False, elem_id=f"{tab}-more"):
        negative = gr.Textbox("", label="Negative prompt", elem_id=f"{tab}-negative")
        with gr.Row():
            steps = gr.Slider(1, 100, sampling.steps, step=1, label="Steps", min_width=140, elem_id=f"{tab}-steps")
            guidance = gr.Slider(
                *(0, 12, sampling.guidance),
                step=0.5,
                label="Guidance",
                info="prompt adherence",
                min_width=140,
                elem_id=f"{tab}-guidance",
            )
        base = gr.Dropdown([DEFAULT_BASE], value=DEFAULT_BASE, label="Base model", elem_id=f"{tab}-base")
        dropped = gr.File(
            label="Load settings from an image", file_types=[".png"], height=170, elem_id=f"{tab}-dropped"
        )
    new_seed.click(lambda: random.randrange(MAX_SEED), None, seed, queue=False)
    base.input(show_errors(_usual_sampling), base, [steps, guidance], **INSTANT)
    return SamplingFields(button, number, seed, negative, steps, guidance, base, dropped)


def _usual_sampling(base: str) -> tuple[int, float]:
    sampling = usual_sampling(base)
    return sampling.steps, sampling.guidance


def settings_from_fields(
    prompt: str | None,
    base: str,
    negative: str | None,
    seed: int | None,
    steps: int,
    guidance: float,
    strengths: Mapping[str, float],
) -> Settings:
    """Return the settings of the next image; `concepts` holds every strength that was changed."""
    return Settings(
        base=base,
        prompt=prompt or "",
        negative_prompt=negative or "",  # None until the field has been shown
        seed=int(seed or 0),
        steps=int(steps),
        guidance=float(guidance),
        concepts={name: float(strength) for name, strength in strengths.items()},
    )


def fields_from_settings(session: Session, settings: Settings) -> tuple[Any, ...]:
    """Return a value for each of `SamplingFields.inputs`."""
    return (
        settings.prompt,
        gr.update(value=session.base_or_default(settings.base), choices=session.bases()),
        settings.negative_prompt,
        settings.seed,
        settings.steps,
        settings.guidance,
        dict(settings.concepts),
    )


def image_output(tab: str, columns: int, text: str) -> tuple[gr.Gallery, gr.Markdown]:
    """Lay out the column with the generated images and a note below them."""
    with gr.Column(scale=3, min_width=320):
        gallery = image_gallery(f"{tab}-gallery", columns, elem_classes=["pixels", "results"])
        return gallery, gr.Markdown(text, elem_id=f"{tab}-note", elem_classes="note")


def show_images(batches: Iterable[Sequence[Path]], seed: int, count: int) -> Iterator[tuple[Any, str]]:
    """Yield updates for `image_output` while images are generated."""
    began, columns = time.perf_counter(), 1 if count == 1 else 2 if count <= 4 else 3
    for paths in batches:
        images = [(str(path), f"seed {seed + place}") for place, path in enumerate(paths)]
        seconds = (time.perf_counter() - began) / len(paths)
        note = f"{len(paths)} of {count} · {seconds:.1f} s per image · saved in {paths[0].parent}/"
        yield gr.update(value=images, columns=columns), note


def on_model(triggers: Any, handler: Callable[..., Any], inputs: list[Any], output: Any, note: gr.Markdown) -> None:
    """Run a handler that uses the model when one of the events occurs, one at a time across all tabs."""
    gr.on(
        triggers,
        show_errors(handler),
        inputs,
        [output, note],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=output,
    )


def image_gallery(elem_id: str, columns: int, **options: Any) -> gr.Gallery:
    """Return a gallery that shows images large and with sharp pixels."""
    look: dict[str, Any] = {"show_label": False, "elem_classes": "pixels", "buttons": ["download", "fullscreen"]}
    return gr.Gallery(
        label="Images",
        columns=columns,
        object_fit="contain",
        height="auto",
        elem_id=elem_id,
        interactive=False,
        **(look | options),
    )


def hidden_image(elem_id: str, label: str, *buttons: str) -> gr.Image:
    """Return an image that is shown when there is one."""
    options: dict[str, Any] = {"elem_id": elem_id, "label": label, "buttons": list(buttons)}
    return gr.Image(show_label=False, visible=False, interactive=False, format="png", **options)


def concept_chips(elem_id: str, label: str = "Concepts", **options: Any) -> gr.CheckboxGroup:
    """Return a choice of concepts, empty until the tab is opened."""
    return gr.CheckboxGroup([], label=label, elem_id=elem_id, elem_classes="chips", **options)


def number_chips(numbers: Sequence[int], number: int, label: str, elem_id: str) -> gr.Radio:
    """Return a choice of numbers, `number` at first."""
    return gr.Radio(list(numbers), value=number, label=label, min_width=150, elem_id=elem_id, elem_classes="chips")


def concept_choices(names: Collection[str], selected: Iterable[str] | None) -> Any:
    """Return an update for `concept_chips` that keeps what is still there selected."""
    return gr.update(choices=list(names), value=[name for name in selected or [] if name in names])


def strength_slider(name: str, values: Mapping[str, float], strengths: gr.State) -> None:
    """Add a slider for a concept, inside `gr.render`; `strengths` maps the names of changed sliders to values."""
    slider = gr.Slider(
        0, 1.5, values.get(name, 1.0), step=0.05, label=f"Strength of {name}", min_width=140, interactive=True
    )
    slider.change(lambda value, others: {**others, name: value}, [slider, strengths], strengths, queue=False)
