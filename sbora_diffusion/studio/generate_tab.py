"""The Generate tab: a prompt, concepts with their strengths, images."""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.inference.image_file import Settings, read_settings
from sbora_diffusion.studio.fields import MAX_SEED, image_gallery, more_fields, seed_field, strength_slider
from sbora_diffusion.studio.messages import told, warn_of_missing
from sbora_diffusion.studio.session import Workshop

PLAIN_PROMPT = "a 3d penguin on the beach"

INSERT = """(text) => {
  const area = document.querySelector("#prompt textarea"), token = %s;
  const at = area ? area.selectionStart : text.length, before = text.slice(0, at), after = text.slice(at);
  const gap = (side, edge) => (side && !edge.test(side) ? " " : "");
  return before + gap(before, /\\s$/) + token + gap(after, /^[\\s,.]/) + after;
}"""


def generate_tab(workshop: Workshop) -> tuple[gr.CheckboxGroup, gr.Dropdown]:
    """Lay it out and wire it up.

    Returns:
        The choice of concepts and of the base model, for others to renew.
    """
    strengths = gr.State({})
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            prompt = gr.Textbox(
                PLAIN_PROMPT, label="What should it show?", lines=2, max_lines=6, elem_id="prompt", autofocus=True
            )
            concepts = gr.CheckboxGroup([], label="Concepts", elem_id="concepts", elem_classes="chips")
            sliders = gr.Column(elem_classes="strengths")
            button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
            with gr.Row(elem_classes="compact"):
                number = gr.Radio(
                    [1, 4, 9], value=4, label="Images", min_width=150, elem_id="count", elem_classes="chips"
                )
                seed = seed_field("seed")
                dice = gr.Button("New seed", size="sm", min_width=90, elem_id="dice")
            with gr.Accordion("More", open=False, elem_id="generate-more"):
                negative, steps, guidance, base, dropped = more_fields("", "Steps", "Settings of an image made here")
        with gr.Column(scale=3, min_width=320):
            gallery = image_gallery("gallery", 2)
            note = gr.Markdown("Your images appear here.", elem_id="note", elem_classes="note")

    with sliders:
        gr.render(inputs=[concepts, strengths, base], triggers=[concepts.change])(
            lambda names, factors, base_name: _sliders(workshop, names, factors, base_name, prompt, strengths)
        )
    settings = [base, prompt, negative, seed, steps, guidance, concepts, strengths]
    gr.on(
        [button.click, prompt.submit],
        told(partial(_draw, workshop)),
        [*settings, number],
        [gallery, note],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=gallery,
    )
    dice.click(lambda: random.randrange(MAX_SEED), None, seed, queue=False)
    base.input(lambda name: _choices(workshop, name), base, concepts, queue=False)
    dropped.upload(told(lambda path: _read(workshop, path)), dropped, settings, queue=False)
    return concepts, base


def renewed(workshop: Workshop, base: str, chosen: Sequence[str]) -> tuple[Any, Any]:
    """The concepts and base models that there are now."""
    names = list(workshop.concepts(base))
    return gr.update(choices=names, value=[name for name in chosen if name in names]), gr.update(
        choices=workshop.bases()
    )


def _choices(workshop: Workshop, base: str) -> Any:
    return gr.update(choices=list(workshop.concepts(base)), value=[])


def _sliders(
    workshop: Workshop,
    names: Sequence[str],
    factors: Mapping[str, float],
    base: str,
    prompt: gr.Textbox,
    strengths: gr.State,
) -> None:
    """For each concept that is on: its tokens to click into the prompt, and its strength."""
    specs = workshop.concepts(base)
    for name in (name for name in names if name in specs):
        with gr.Row(equal_height=True, elem_classes="strength"):
            for token in specs[name].tokens:
                chip = gr.Button(token, size="sm", min_width=70, scale=0, elem_classes="token")
                chip.click(None, prompt, prompt, js=INSERT % json.dumps(token))
            strength_slider(name, factors, strengths)


def _draw(
    workshop: Workshop,
    base: str,
    prompt: str,
    negative: str | None,
    seed: int,
    steps: int,
    guidance: float,
    concepts: Sequence[str],
    strengths: Mapping[str, float],
    number: int,
) -> Iterator[tuple[Any, str]]:
    """The gallery as it fills."""
    settings = Settings(
        base=base,
        prompt=prompt,
        negative_prompt=negative or "",  # None until the field has been shown
        seed=int(seed or 0),
        steps=int(steps),
        guidance=float(guidance),
        concepts={name: float(strengths.get(name, 1.0)) for name in concepts},
    )
    began, columns = time.perf_counter(), 1 if number == 1 else 2 if number <= 4 else 3
    for paths in workshop.draw(settings, int(number)):
        images = [(str(path), f"seed {settings.seed + place}") for place, path in enumerate(paths)]
        seconds = (time.perf_counter() - began) / len(paths)
        yield (
            gr.update(value=images, columns=columns),
            f"{len(paths)} of {int(number)} · {seconds:.1f} s an image · kept in {workshop.folders.outputs}/",
        )


def _read(workshop: Workshop, path: str) -> tuple[Any, ...]:
    """A dropped image's settings, for every field of the tab; concepts that are gone are left out."""
    made = read_settings(Path(path))
    base = workshop.base_or_default(made.base)
    if made.regions:
        gr.Warning("This image was made in Regions: drop it there to have its boxes.")
    elif made.gated:
        gr.Warning("Its concepts acted only where they were named (gated): here they act everywhere.")
    known = list(workshop.concepts(base))
    warn_of_missing(made.concepts, known)
    return (
        gr.update(value=base, choices=workshop.bases()),
        made.prompt,
        made.negative_prompt,
        made.seed,
        made.steps,
        made.guidance,
        gr.update(choices=known, value=[name for name in made.concepts if name in known]),
        dict(made.concepts),
    )
