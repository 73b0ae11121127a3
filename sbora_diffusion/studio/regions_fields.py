"""Handlers of the Regions tab: tokens and chips that follow each other, images, and the settings of a dropped image."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.inference.image_file import read_settings
from sbora_diffusion.inference.regions import Region, parse_region
from sbora_diffusion.studio.box_canvas import MAX_BOXES, box, fractions
from sbora_diffusion.studio.fields import concept_choices, fields_from_settings, settings_from_fields, show_images
from sbora_diffusion.studio.messages import warn_of_missing
from sbora_diffusion.studio.session import Session
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.text import tokens_in

Boxes = Sequence[dict[str, Any]]


def refresh_choices(session: Session, base: str, *selected: Sequence[str]) -> tuple[Any, ...]:
    """Return the tokens as text, and updates for the base models and the concepts of each box."""
    tokens, names = session.tokens(base), session.singles(base)
    text = "Tokens: " + " ".join(f"`{token}`" for token in tokens) if tokens else "The library has no concepts yet."
    return text, gr.update(choices=session.bases()), *(concept_choices(names, chosen) for chosen in selected)


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
    fields, prompts, selected = values[: -2 * MAX_BOXES], values[-2 * MAX_BOXES : -MAX_BOXES], values[-MAX_BOXES:]
    settings = settings_from_fields(*fields)
    regions = _regions(session, settings.base, boxes, prompts, selected)
    yield from show_images(session.generate_regions(settings, regions, int(count)), settings.seed, int(count))


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
        *fields_from_settings(session, settings),
        *(region.prompt for region in regions),
        *empty,
        *(concept_choices(known, names) for names in [*selected, *([] for _ in empty)]),
    )


def _to_box(number: int, region: Region) -> dict[str, Any]:
    left, top, right, bottom = (round(100 * side, 4) for side in region.box)
    return box(number, left, top, round(right - left, 4), round(bottom - top, 4))
