"""The Regions tab: boxes with their own prompts and concepts in one image; tokens and chips follow each other."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.inference.image_file import read_settings
from sbora_diffusion.inference.regions import Region, parse_region
from sbora_diffusion.studio import fields
from sbora_diffusion.studio.box_canvas import MAX_BOXES, box, box_canvas, fractions
from sbora_diffusion.studio.messages import show_errors, warn_of_missing
from sbora_diffusion.studio.session import Session
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import tokens_in

Boxes = Sequence[dict[str, Any]]
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
        show_boxes,
        canvas,
        list(groups),
        trigger_mode="always_last",
        **fields.INSTANT,
    )
    base = sampling.base
    for prompt, chips in zip(prompts, selected, strict=True):
        chips.input(partial(write_tokens, session), [base, prompt, chips], prompt, **fields.INSTANT)
        prompt.blur(partial(select_named, session), [base, prompt, chips], chips, **fields.INSTANT)
    halves.click(lambda: [box(0, 0, 0, 50, 100), box(1, 50, 0, 50, 100)], None, canvas, queue=False)
    clear.click(list, None, canvas, queue=False)
    settings = [canvas, *sampling.inputs(scene, strengths), *prompts, *selected]
    generate = partial(generate_images, session)
    fields.on_model(sampling.button.click, generate, [sampling.number, *settings], gallery, note)
    load = show_errors(partial(load_settings, session))
    sampling.dropped.upload(load, sampling.dropped, settings, queue=False)
    refresh = partial(refresh_choices, session)
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


def refresh_choices(session: Session, base: str, *selected: Sequence[str]) -> tuple[Any, ...]:
    """Return the tokens as text, and updates for the base models and the concepts of each box."""
    tokens, names = session.tokens(base), session.singles(base)
    text = "Tokens: " + " ".join(f"`{token}`" for token in tokens) if tokens else "The library has no concepts yet."
    return text, gr.update(choices=session.bases()), *(fields.concept_choices(names, chosen) for chosen in selected)


def show_boxes(boxes: Boxes | None) -> list[Any]:
    """Show the fields of each box that was drawn."""
    return [gr.update(visible=number < len(boxes or [])) for number in range(MAX_BOXES)]


def write_tokens(session: Session, base: str, prompt: str, selected: Sequence[str]) -> str:
    """Return the prompt with the tokens of the selected concepts, and without those of all others."""
    prompt = prompt or ""
    for name, spec in session.singles(base).items():
        named = [token for token in spec.tokens if token in prompt]
        if name in selected and not named:
            prompt = " ".join([prompt, "and"] * bool(prompt.strip()) + [f"a {token}" for token in spec.tokens])
        elif name not in selected:
            for token in named:
                prompt = re.sub(rf"\s*(\band\s+)?(\ba\s+)?{re.escape(token)}", "", prompt)
    return prompt.strip().removeprefix("and ").strip()


def select_named(session: Session, base: str, prompt: str, selected: Sequence[str]) -> list[str]:
    """Return the selected concepts together with those that the prompt names."""
    owners = session.tokens(base)
    return list(dict.fromkeys([*(selected or []), *(owners[t] for t in tokens_in(prompt or "") if t in owners)]))


def generate_images(session: Session, count: int, boxes: Boxes | None, *values: Any) -> Iterator[tuple[Any, str]]:
    """Yield updates for the gallery and the note while images are generated.

    Args:
        values: those of `SamplingFields.inputs`, then the prompt and the selected concepts of each box.
    """
    sampling, prompts, selected = values[: -2 * MAX_BOXES], values[-2 * MAX_BOXES : -MAX_BOXES], values[-MAX_BOXES:]
    settings = fields.settings_from_fields(*sampling)
    regions = _regions(session, settings.base, boxes, prompts, selected)
    yield from fields.show_images(session.generate_regions(settings, regions, int(count)), settings.seed, int(count))


def _regions(
    session: Session, base: str, boxes: Boxes | None, prompts: Sequence[str], selected: Sequence[Sequence[str]]
) -> list[Region]:
    if not boxes:
        raise SboraError("there is no box", "Drag on the square to draw one, or press Left and right.")
    owners, regions = session.tokens(base), []
    for place, prompt, chosen in zip(_places(boxes), prompts, selected, strict=False):
        if not (prompt or "").strip():
            raise SboraError(f"box {len(regions) + 1} has no prompt", "Describe what it should show.")
        named = {owners.get(token) for token in tokens_in(prompt)}
        unnamed = tuple(name for name in chosen or [] if name not in named)
        regions.append(Region(box=place, prompt=prompt.strip(), adapters=unnamed))
    return regions


def _places(boxes: Boxes) -> list[tuple[float, float, float, float]]:
    try:
        return fractions(boxes)
    except (KeyError, TypeError):
        raise SboraError("the boxes cannot be read", "Clear them and draw again.") from None


def load_settings(session: Session, path: str) -> tuple[Any, ...]:
    """Return boxes and settings of a dropped image for every field; missing concepts are left out with a warning."""
    settings = read_settings(Path(path))
    if not settings.regions:
        raise SboraError("this image has no regions", "Drop it in Generate.")
    if not settings.whole_scene:
        gr.Warning("This image was generated with whole_scene off. Here each box also sees the rest of the scene.")
    base = session.base_or_default(settings.base)
    known, regions = session.singles(base), [parse_region(text) for text in settings.regions[:MAX_BOXES]]
    warn_of_missing(settings.concepts, known)
    empty = [""] * (MAX_BOXES - len(regions))
    selected = [select_named(session, base, region.prompt, region.adapters) for region in regions]
    return (
        [_to_box(number, region) for number, region in enumerate(regions)],
        *fields.fields_from_settings(session, settings),
        *(region.prompt for region in regions),
        *empty,
        *(fields.concept_choices(known, names) for names in [*selected, *([] for _ in empty)]),
    )


def _to_box(number: int, region: Region) -> dict[str, Any]:
    left, top, right, bottom = (round(100 * side, 4) for side in region.box)
    return box(number, left, top, round(right - left, 4), round(bottom - top, 4))
