"""What the fields of the Regions tab do: tokens and chips that follow each other, drawing, and a dropped image."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.inference.generate import TOKEN
from sbora_diffusion.inference.image_file import Settings, read_settings
from sbora_diffusion.inference.regions import Region, parse_region
from sbora_diffusion.studio.box_canvas import MAX_BOXES, box, fractions
from sbora_diffusion.studio.messages import warn_of_missing
from sbora_diffusion.studio.session import Workshop
from sbora_diffusion.utils.errors import SboraError

Boxes = Sequence[dict[str, Any]]


def renewed_regions(workshop: Workshop, base: str, *picked: Sequence[str]) -> tuple[Any, ...]:
    """What prompts may say, the base models, and the concepts of each box that there are now."""
    tokens, names = workshop.tokens(base), list(workshop.singles(base))
    said = "Concepts: " + " ".join(f"`{token}`" for token in tokens) if tokens else "No concept is in the library yet."
    chips = [gr.update(choices=names, value=[name for name in chosen or [] if name in names]) for chosen in picked]
    return said, gr.update(choices=workshop.bases()), *chips


def visible(boxes: Boxes | None) -> list[Any]:
    """Fields for each box that there is."""
    return [gr.update(visible=number < len(boxes or [])) for number in range(MAX_BOXES)]


def written(workshop: Workshop, base: str, prompt: str, picked: Sequence[str]) -> str:
    """The prompt with the tokens of the concepts that are picked, without those of the others."""
    prompt = prompt or ""
    for name, spec in workshop.singles(base).items():
        said = [token for token in spec.tokens if token in prompt]
        if name in picked and not said:
            prompt = " ".join([prompt, "and"] * bool(prompt.strip()) + [f"a {token}" for token in spec.tokens])
        elif name not in picked:
            for token in said:
                prompt = re.sub(rf"\s*(\band\s+)?(\ba\s+)?{re.escape(token)}", "", prompt)
    return prompt.strip().removeprefix("and ").strip()


def named(workshop: Workshop, base: str, prompt: str, picked: Sequence[str]) -> list[str]:
    """The concepts that are picked, with those that the prompt names."""
    owners = workshop.tokens(base)
    return list(dict.fromkeys([*(picked or []), *(owners[t] for t in TOKEN.findall(prompt or "") if t in owners)]))


def draw(
    workshop: Workshop,
    number: int,
    boxes: Boxes | None,
    base: str,
    around: str,
    negative: str | None,
    seed: int,
    steps: int,
    guidance: float,
    strengths: Mapping[str, float],
    *prompts_and_picked: Any,
) -> Iterator[tuple[Any, str]]:
    """The gallery as it fills."""
    if not boxes:
        raise SboraError("there is no box", "Drag on the square to draw one, or press Left and right.")
    owners, regions = workshop.tokens(base), []
    prompts, picked = prompts_and_picked[:MAX_BOXES], prompts_and_picked[MAX_BOXES:]
    for place, prompt, chosen in zip(_places(boxes), prompts, picked, strict=False):
        if not (prompt or "").strip():
            raise SboraError(f"box {len(regions) + 1} has no prompt", "Say what is to be there.")
        said = {owners.get(token) for token in TOKEN.findall(prompt)}
        unsaid = tuple(name for name in chosen or [] if name not in said)
        regions.append(Region(box=place, prompt=prompt.strip(), adapters=unsaid))
    settings = Settings(
        base=base,
        prompt=around or "",
        negative_prompt=negative or "",  # None until the field has been shown
        seed=int(seed or 0),
        steps=int(steps),
        guidance=float(guidance),
        concepts={name: float(strength) for name, strength in strengths.items()},
    )
    for paths in workshop.draw_regions(settings, regions, int(number)):
        images = [(str(path), f"seed {settings.seed + place}") for place, path in enumerate(paths)]
        yield gr.update(value=images, columns=1 if number == 1 else 2), f"{len(paths)} of {int(number)}"


def read(workshop: Workshop, path: str) -> tuple[Any, ...]:
    """A dropped image's boxes and settings, for every field of the tab; concepts that are gone are left out."""
    made = read_settings(Path(path))
    if not made.regions:
        raise SboraError("this image has no regions", "Drop it in Generate.")
    if not made.whole_scene:
        gr.Warning("Its boxes heard their own prompts only: here each hears of the whole image.")
    base = workshop.base_or_default(made.base)
    known, regions = list(workshop.singles(base)), [parse_region(text) for text in made.regions[:MAX_BOXES]]
    warn_of_missing(made.concepts, known)
    empty = [""] * (MAX_BOXES - len(regions))
    prompts = [region.prompt for region in regions] + empty
    chosen = [[n for n in named(workshop, base, r.prompt, r.adapters) if n in known] for r in regions]
    chips = [gr.update(choices=known, value=names) for names in [*chosen, *([] for _ in empty)]]
    return (
        [_drawn(number, region) for number, region in enumerate(regions)],
        gr.update(value=base, choices=workshop.bases()),
        made.prompt,
        made.negative_prompt,
        made.seed,
        made.steps,
        made.guidance,
        dict(made.concepts),
        *prompts,
        *chips,
    )


def _drawn(number: int, region: Region) -> dict[str, Any]:
    left, top, right, bottom = (round(100 * side, 4) for side in region.box)
    return box(number, left, top, round(right - left, 4), round(bottom - top, 4))


def _places(boxes: Boxes) -> list[tuple[float, float, float, float]]:
    try:
        return fractions(boxes)
    except (KeyError, TypeError):
        raise SboraError("the boxes cannot be read", "Clear them and draw again.") from None
