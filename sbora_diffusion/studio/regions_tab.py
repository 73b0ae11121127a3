"""The Regions tab: boxes with their own prompts and concepts in one image."""

from collections.abc import Mapping, Sequence
from functools import partial

import gradio as gr

from sbora_diffusion.studio import fields
from sbora_diffusion.studio import regions_fields as handlers
from sbora_diffusion.studio.box_canvas import MAX_BOXES, box, box_canvas
from sbora_diffusion.studio.messages import show_errors
from sbora_diffusion.studio.session import Session

NOTE = (
    "Each concept acts only inside its own box. A concept that is selected for a box but not named in its prompt acts "
    "on the whole box."
)


def regions_tab(session: Session) -> fields.Refresh:
    """Lay out the tab and connect its events."""
    strengths = gr.State({})
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            canvas = box_canvas()
            with gr.Row():
                halves = gr.Button("Left and right", size="sm", min_width=100, elem_id="halves")
                clear = gr.Button("Clear", size="sm", min_width=100, elem_id="clear")
            groups, prompts, selected = zip(*map(_box_fields, range(1, MAX_BOXES + 1)), strict=True)
            scene = gr.Textbox("on the beach", label="Prompt for the whole image", elem_id="scene")
            tokens = gr.Markdown("", elem_classes="note", elem_id="tokens")
            sliders = gr.Column(elem_classes="strengths")
            sampling = fields.sampling_fields("regions", (1, 4), 1)
        gallery, note = fields.image_output("regions", 1, NOTE)

    with sliders:
        gr.render(inputs=[strengths, *selected], triggers=[chips.change for chips in selected])(
            lambda values, *names: _sliders(names, values, strengths)
        )
    gr.on(  # one at a time, always the last: two at once may return in the other order
        [canvas.input, canvas.change],
        handlers.show_boxes,
        canvas,
        list(groups),
        trigger_mode="always_last",
        **fields.INSTANT,
    )
    base = sampling.base
    for prompt, chips in zip(prompts, selected, strict=True):
        chips.input(partial(handlers.write_tokens, session), [base, prompt, chips], prompt, **fields.INSTANT)
        prompt.blur(partial(handlers.select_named, session), [base, prompt, chips], chips, **fields.INSTANT)
    halves.click(lambda: [box(0, 0, 0, 50, 100), box(1, 50, 0, 50, 100)], None, canvas, queue=False)
    clear.click(list, None, canvas, queue=False)
    settings = [canvas, *sampling.inputs(scene, strengths), *prompts, *selected]
    generate = partial(handlers.generate_images, session)
    fields.on_model(sampling.button.click, generate, [sampling.number, *settings], gallery, note)
    load = show_errors(partial(handlers.load_settings, session))
    sampling.dropped.upload(load, sampling.dropped, settings, queue=False)
    refresh = partial(handlers.refresh_choices, session)
    base.input(refresh, [base, *selected], [tokens, base, *selected], queue=False)
    return fields.Refresh(refresh, [base, *selected], [tokens, base, *selected])


def _box_fields(number: int) -> tuple[gr.Group, gr.Textbox, gr.CheckboxGroup]:
    """Add the prompt and the concepts of a box, hidden until the box is drawn."""
    with gr.Group(visible=False) as group:
        prompt = gr.Textbox("", label=f"Prompt for box {number}", elem_id=f"region-{number}")
        chips = fields.concept_chips(f"concepts-{number}", f"Concepts in box {number}", show_label=False)
    return group, prompt, chips


def _sliders(selected: Sequence[Sequence[str]], values: Mapping[str, float], strengths: gr.State) -> None:
    """Add a strength slider for each concept of any box."""
    for name in sorted(set().union(*selected)):
        with gr.Row(elem_classes="strength"):
            fields.strength_slider(name, values, strengths)
