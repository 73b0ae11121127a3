"""The Regions tab: boxes with a prompt and concepts of their own, in one picture."""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import gradio as gr

from sbora_diffusion.diffusion.picture_file import Settings
from sbora_diffusion.diffusion.regions import Region
from sbora_diffusion.errors import SboraError
from sbora_diffusion.studio.board import MAX_BOXES, board, box, fractions
from sbora_diffusion.studio.messages import told
from sbora_diffusion.studio.workshop import DEFAULT_BASE, Workshop

MAX_SEED = 2**31 - 1


def regions_tab(workshop: Workshop) -> tuple[gr.Markdown, gr.Dropdown]:
    """Lay it out and wire it up; the list of tokens and the choice of the base model, to be renewed."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            canvas = board()
            with gr.Row():
                halves = gr.Button("Left and right", size="sm", min_width=100, elem_id="halves")
                clear = gr.Button("Clear", size="sm", min_width=100, elem_id="clear")
            prompts = [
                gr.Textbox("", label=f"In box {number + 1}", visible=False, elem_id=f"region-{number + 1}")
                for number in range(MAX_BOXES)
            ]
            around = gr.Textbox("on the beach", label="In the whole picture", elem_id="around")
            tokens = gr.Markdown("", elem_classes="note", elem_id="tokens")
            button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate-regions")
            with gr.Row(elem_classes="compact"):
                number = gr.Radio([1, 4], value=1, label="Pictures", min_width=120, elem_classes="chips")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90)
                dice = gr.Button("New seed", size="sm", min_width=90)
            with gr.Accordion("More", open=False, elem_id="regions-more"):
                steps = gr.Slider(1, 100, 20, step=1, label="Steps of regions", min_width=140)
                guidance = gr.Slider(1, 12, 3, step=0.5, label="Guidance", min_width=140)
                base = gr.Dropdown([DEFAULT_BASE], value=DEFAULT_BASE, label="Base model")
        with gr.Column(scale=3, min_width=320):
            gallery = gr.Gallery(
                label="Pictures",
                show_label=False,
                columns=1,
                object_fit="contain",
                height="auto",
                elem_id="regions-gallery",
                elem_classes="pixels",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            note = gr.Markdown("Each concept acts in its own box only.", elem_id="regions-note", elem_classes="note")

    gr.on(  # one at a time, the last one always: two at once may come back in the other order
        [canvas.input, canvas.change],
        _fields,
        canvas,
        prompts,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    halves.click(lambda: [box(0, 0, 0, 50, 100), box(1, 50, 0, 50, 100)], None, canvas, queue=False)
    clear.click(list, None, canvas, queue=False)
    dice.click(lambda: random.randrange(MAX_SEED), None, seed, queue=False)
    button.click(
        told(partial(_draw, workshop)),
        [canvas, around, base, seed, steps, guidance, number, *prompts],
        [gallery, note],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress="minimal",
        show_progress_on=gallery,
    )
    return tokens, base


def sayable(workshop: Workshop, base: str) -> tuple[str, Any]:
    """The tokens that prompts may say, and the base models."""
    tokens = dict.fromkeys(token for spec in workshop.concepts(base).values() for token in spec.tokens)
    said = "Concepts: " + " ".join(f"`{token}`" for token in tokens) if tokens else "No concept is in the library yet."
    return said, gr.update(choices=workshop.bases())


def _fields(boxes: Sequence[dict[str, Any]] | None) -> list[Any]:
    """A prompt for each box that there is."""
    return [gr.update(visible=number < len(boxes or [])) for number in range(MAX_BOXES)]


def _draw(
    workshop: Workshop,
    boxes: Sequence[dict[str, Any]] | None,
    around: str,
    base: str,
    seed: int,
    steps: int,
    guidance: float,
    number: int,
    *prompts: str | None,
) -> Iterator[tuple[Any, str]]:
    """The gallery as it fills."""
    if not boxes:
        raise SboraError("there is no box", "Drag on the square to draw one, or press Left and right.")
    regions = []
    for place, prompt in zip(_places(boxes), prompts, strict=False):
        if not (prompt or "").strip():
            raise SboraError(f"box {len(regions) + 1} has no prompt", "Say what is to be there.")
        regions.append(Region(box=place, prompt=prompt or ""))
    settings = Settings(
        base=base,
        prompt=around or "",
        negative_prompt="",
        seed=int(seed or 0),
        steps=int(steps),
        guidance=float(guidance),
        regions=tuple(f"{','.join(f'{x:g}' for x in region.box)}: {region.prompt}" for region in regions),
    )
    for paths in workshop.draw_regions(settings, regions, int(number)):
        pictures = [(str(path), f"seed {settings.seed + place}") for place, path in enumerate(paths)]
        yield gr.update(value=pictures, columns=1 if number == 1 else 2), f"{len(paths)} of {int(number)}"


def _places(boxes: Sequence[dict[str, Any]]) -> list[tuple[float, float, float, float]]:
    try:
        return fractions(boxes)
    except (KeyError, TypeError):
        raise SboraError("the boxes cannot be read", "Clear them and draw again.") from None
