"""The Regions tab: boxes with a prompt and concepts of their own, in one image."""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

from sbora_diffusion.studio.box_canvas import MAX_BOXES, board, box
from sbora_diffusion.studio.fields import MAX_SEED, image_gallery, more_fields, seed_field, strength_slider
from sbora_diffusion.studio.messages import told
from sbora_diffusion.studio.regions_fields import draw, named, read, renewed_regions, visible, written
from sbora_diffusion.studio.session import Workshop

NOTE = "Each concept acts in its own box only. One that is picked for a box, but not named there, acts on all of it."


def regions_tab(workshop: Workshop) -> list[Any]:
    """Lay it out and wire it up; what is to be renewed: tokens, base models, the concepts of each box."""
    strengths = gr.State({})
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            canvas = board()
            with gr.Row():
                halves = gr.Button("Left and right", size="sm", min_width=100, elem_id="halves")
                clear = gr.Button("Clear", size="sm", min_width=100, elem_id="clear")
            groups, prompts, picked = zip(*map(_box_fields, range(1, MAX_BOXES + 1)), strict=True)
            around = gr.Textbox("on the beach", label="In the whole image", elem_id="around")
            tokens = gr.Markdown("", elem_classes="note", elem_id="tokens")
            sliders = gr.Column(elem_classes="strengths")
            button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate-regions")
            with gr.Row(elem_classes="compact"):
                number = gr.Radio([1, 4], value=1, label="Images", min_width=120, elem_classes="chips")
                seed = seed_field("regions-seed")
                dice = gr.Button("New seed", size="sm", min_width=90)
            with gr.Accordion("More", open=False, elem_id="regions-more"):
                negative, steps, guidance, base, dropped = more_fields(
                    "regions-", "Steps of regions", "Boxes and settings of an image made here"
                )
        with gr.Column(scale=3, min_width=320):
            gallery = image_gallery("regions-gallery", 1)
            note = gr.Markdown(NOTE, elem_id="regions-note", elem_classes="note")

    with sliders:
        gr.render(inputs=[strengths, *picked], triggers=[chips.change for chips in picked])(
            lambda factors, *chosen: _sliders(chosen, factors, strengths)
        )
    gr.on(  # one at a time, the last one always: two at once may come back in the other order
        [canvas.input, canvas.change],
        visible,
        canvas,
        list(groups),
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    for prompt, chips in zip(prompts, picked, strict=True):
        chips.input(partial(written, workshop), [base, prompt, chips], prompt, queue=False, show_progress="hidden")
        prompt.blur(partial(named, workshop), [base, prompt, chips], chips, queue=False, show_progress="hidden")
    halves.click(lambda: [box(0, 0, 0, 50, 100), box(1, 50, 0, 50, 100)], None, canvas, queue=False)
    clear.click(list, None, canvas, queue=False)
    dice.click(lambda: random.randrange(MAX_SEED), None, seed, queue=False)
    fields = [canvas, base, around, negative, seed, steps, guidance, strengths, *prompts, *picked]
    button.click(
        told(partial(draw, workshop)),
        [number, *fields],
        [gallery, note],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=gallery,
    )
    dropped.upload(told(partial(read, workshop)), dropped, fields, queue=False)
    renewable = [tokens, base, *picked]
    base.input(partial(renewed_regions, workshop), [base, *picked], renewable, queue=False)
    return renewable


def _box_fields(number: int) -> tuple[gr.Group, gr.Textbox, gr.CheckboxGroup]:
    """What one box is to show; not seen before the box is there."""
    with gr.Group(visible=False) as group:
        prompt = gr.Textbox("", label=f"In box {number}", elem_id=f"region-{number}")
        chips = gr.CheckboxGroup(
            [], label=f"Concepts in box {number}", show_label=False, elem_id=f"concepts-{number}", elem_classes="chips"
        )
    return group, prompt, chips


def _sliders(chosen: Sequence[Sequence[str]], factors: Mapping[str, float], strengths: gr.State) -> None:
    """One for each concept that a box has."""
    for name in sorted(set().union(*chosen)):
        with gr.Row(elem_classes="strength"):
            strength_slider(name, factors, strengths)
